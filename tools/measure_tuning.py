"""What the exact target of DD2's first stage is worth against the Monte-Carlo one (DD2, arXiv 2510.21003, table 5).

    .venv/bin/python tools/measure_tuning.py --pairs runs/pairs --out runs/tuning --steps 200 --num 1000

Both runs begin alike and see the same batches and noise. Prints a Markdown table: the squared error of the velocities
against the exact ones on sequences that were kept apart, and E of what the networks sample position by position.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddecode.checkpoint import ModelFolder
from ddecode.cli.eval import open_judge
from ddecode.config import as_dict
from ddecode.evaluation.metrics import Gaussian, control_share, fit_gaussian, frechet_distance
from ddecode.evaluation.zoo import Judge, permute_within_class
from ddecode.images import to_uint8
from ddecode.objectives.guidance import ARDiffusion
from ddecode.objectives.tuning import TuningObjective
from ddecode.pairs import Pairs
from ddecode.randomness import draw_noise, fresh_weights, sample_generators
from ddecode.teacher import Teacher
from ddecode.training import train
from ddecode.training_config import TrainingConfig

KEPT = 512
"""Sequences at the end of the pairs that are kept for measuring the error; those before them train."""
BATCH = 250


@dataclass
class Beginning:
    """All pairs but the last `KEPT`."""

    pairs: Pairs

    def __len__(self) -> int:
        return len(self.pairs) - KEPT

    def batch(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self.pairs.batch(indices)


@torch.no_grad()
def held_out(teacher: Teacher, pairs: Pairs, model: ARDiffusion) -> float:
    """Squared error against the exact velocities."""
    objective, first = TuningObjective(teacher, model), len(pairs) - KEPT
    generator = torch.Generator().manual_seed(0)
    losses = [
        objective(*pairs.batch([*range(at, at + 64)]), generator)[0].item() for at in range(first, len(pairs), 64)
    ]
    return float(np.mean(losses))


class Distances:
    """E of ids of balanced labels, by the `zoo` protocol's formula.

    Args:
        teacher, judge: as there.
        num: samples of each set.
        seed: of the teacher's two sets.
    """

    def __init__(self, teacher: Teacher, judge: Judge, num: int, seed: int) -> None:
        self.teacher, self.judge, self.num, self.labels_N = teacher, judge, num, torch.arange(num) % teacher.num_classes
        ours, other = (self.sampled(seed + i) for i in range(2))
        self.target = self.gaussian(ours)
        permuted = permute_within_class(other[..., None], self.labels_N.numpy(), seed)[..., 0]
        self.floor, self.control = (frechet_distance(self.gaussian(ids), self.target) for ids in (other, permuted))

    def sampled(self, seed: int) -> Tensor:
        generators, recipe = sample_generators(seed, range(self.num)), self.teacher.recipe
        return torch.cat([
            self.teacher.generate(
                self.labels_N[at : at + BATCH], guidance_scale=recipe.guidance_scale, top_k=recipe.top_k,
                top_p=recipe.top_p, generator=generators[at : at + BATCH],
            )
            for at in range(0, self.num, BATCH)
        ])  # fmt: skip

    def gaussian(self, ids_NL: Tensor) -> Gaussian:
        images = [to_uint8(self.teacher.tokenizer.decode(part)) for part in ids_NL.split(BATCH)]
        return fit_gaussian(self.judge.look(np.concatenate(images))[0])

    def share(self, ids_NL: Tensor) -> float:
        return control_share(frechet_distance(self.gaussian(ids_NL), self.target), self.floor, self.control)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fashion-llamagen")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    folder = ModelFolder.open(args.model)
    teacher, pairs = folder.teacher(), Pairs(args.pairs, teacher_hash=folder.teacher_hash())
    if len(pairs) < 2 * KEPT:
        parser.error(f"--pairs holds {len(pairs)} pairs; at least {2 * KEPT} are needed")
    distances = Distances(teacher, open_judge(folder), args.num, args.seed)
    shape = teacher.length, teacher.codebook_VC.shape[1]
    noise_NLC = draw_noise(sample_generators(args.seed + 2, range(args.num)), args.num, shape)
    config = TrainingConfig(
        steps=args.steps, batch=args.batch, lr=1e-3, warmup_steps=20, ema_decay=0.98, precision="bf16", compile=True,
        log_every=10, seed=args.seed,
    )  # fmt: skip
    print(f"{args.model}, {args.steps} steps of {args.batch}; E: n {args.num} a set, seed {args.seed}\n")
    print("| target | held-out error of the velocities | E |\n|---|---|---|")
    for target in ("analytic", "monte_carlo"):
        with fresh_weights(args.seed):
            network = ARDiffusion.from_teacher(teacher)
        objective = TuningObjective(teacher, network, target=target)
        identity = {"target": target, "config": as_dict(config), "teacher": folder.teacher_hash(), "pairs": len(pairs)}
        model = train(objective, Beginning(pairs), config, args.out / target, identity=identity, resume=True)
        assert isinstance(model, ARDiffusion)
        parts = zip(noise_NLC.split(BATCH), distances.labels_N.split(BATCH), strict=True)
        ids_NL = torch.cat([model.sample(noise, labels, teacher.codebook_VC) for noise, labels in parts])
        print(f"| {target} | {held_out(teacher, pairs, model):.4f} | {distances.share(ids_NL):.1%} |", flush=True)


if __name__ == "__main__":
    main()
