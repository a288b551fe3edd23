"""How far a student's sequences are from its teacher's, in nats a picture, for each number of passes.

    .venv/bin/python tools/measure_divergence.py fashion-llamagen --steps 1,2 --num 1024 --seed 2

For students that settle tokens within the pass and leave the map to its formula (`student.exits`, `student.wavefront`).
Along noise-token pairs that no training saw, the divergences KL(teacher || student) of the tokens' probabilities add up
to that of whole sequences, by the chain rule. What the map loses for want of evaluations is not in it. Sets of pictures
tell two good students apart only if they are very large; this does with few. Prints a Markdown table, with standard
errors.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ddecode.cli.arguments import add_model, read_steps
from ddecode.pairs import noise_of
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan
from ddecode.randomness import derived_seed
from ddecode.settling_student import SettlingStudent
from ddecode.trajectory import resolve

STREAM = 4
"""Of the noise, which no pairs share."""


def spans_of(plan: Plan) -> list[tuple[int, int]]:
    """The tokens that each pass leaves to the end."""
    starts = [span.start for span in plan.spans]
    return list(zip(starts, [*starts[1:], plan.length], strict=True))


@torch.no_grad()
def divergences(
    student: SettlingStudent,
    noise_BLC: Tensor,
    labels_B: Tensor,
    ids_BL: Tensor,
    log_probs_BLV: Tensor,
    span: tuple[int, int],
) -> Tensor:
    """fp32 [B]: of the tokens of one pass, given the teacher's before."""
    start, stop = span
    codes_BLC = F.embedding(ids_BL, student.codebook_VC)
    position_L = torch.arange(student.length, device=ids_BL.device)
    sequence_BLC = torch.where((position_L < start)[:, None], codes_BLC, noise_BLC)
    start_B, stop_B = torch.full_like(labels_B, start), torch.full_like(labels_B, stop)
    logits_BLV = student(sequence_BLC, labels_B, start_B, told_BL=ids_BL, stop_B=stop_B).logits_BLV
    theirs_BNV, ours_BNV = log_probs_BLV[:, start:stop], logits_BLV[:, start:stop].log_softmax(-1)
    return F.kl_div(ours_BNV, theirs_BNV, reduction="none", log_target=True).nan_to_num(0.0).sum((1, 2))


def measure(pipe: DistilledPipeline, plans: list[Plan], *, num: int, seed: int, batch: int) -> Tensor:
    """Divergences fp32 [num, passes of all plans, one after the other]."""
    student, teacher = pipe.student, pipe.teacher
    if not isinstance(student, SettlingStudent) or teacher is None:
        raise SystemExit("this needs a teacher and a student that settles tokens within the pass")
    recipe = pipe.recipe
    spans = [span for plan in plans for span in spans_of(plan)]
    rows = []
    for first in tqdm(range(0, num, batch)):
        samples = range(first, min(first + batch, num))
        noise_BLC = noise_of(
            [derived_seed(seed, STREAM, i) for i in samples], (pipe.length, student.codebook_VC.shape[1])
        )
        labels_B = torch.tensor([i % pipe.num_classes for i in samples])
        ids_BL = resolve(
            teacher, noise_BLC, labels_B, guidance_scale=recipe.guidance_scale, top_k=recipe.top_k, top_p=recipe.top_p
        )
        with torch.no_grad():
            log_probs_BLV = teacher.log_probs(ids_BL, labels_B, recipe)
        given = noise_BLC, labels_B, ids_BL, log_probs_BLV
        rows.append(torch.stack([divergences(student, *given, span) for span in spans], 1))
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--steps", default="1,2")
    parser.add_argument("--num", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()

    pipe = DistilledPipeline.from_pretrained(args.model)
    plans = [pipe.plan(steps) for steps in read_steps(args.steps)]
    nats_NS = measure(pipe, plans, num=args.num, seed=args.seed, batch=args.batch)
    print(f"{args.model}, n {args.num}, seed {args.seed}\n\n| plan | nats a picture | of each pass |\n|---|---|---|")
    for plan, nats_Np in zip(plans, nats_NS.split([len(plan.spans) for plan in plans], 1), strict=True):
        total_N = nats_Np.sum(1)
        error = total_N.std().item() / len(total_N) ** 0.5
        each = " + ".join(f"{value:.2f}" for value in nats_Np.mean(0).tolist())
        print(f"| `{plan}` | {total_N.mean().item():.2f} ± {error:.2f} | {each} |")


if __name__ == "__main__":
    main()
