"""What each part of a distillation is worth: short runs that differ from one recipe in one thing, judged together.

    .venv/bin/python tools/measure_ablations.py --out runs/ablations              # all: 100 minutes on 2 CPU cores
    .venv/bin/python tools/measure_ablations.py --out runs/ablations --only dd1   # one, and the run it starts from

The recipe is configs/fashion-llamagen-ablation.yaml. All rows have the same budget, six minutes of two cores: steps are
set so that each takes about as long, with the run it starts from; the table says how long. Stopped and started again it
goes on; runs that are there are not repeated. Prints a Markdown table of protocol `zoo`, all students against the same
two sets of teacher samples.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from ddecode.checkpoint import RECIPE as RECIPE_FILE
from ddecode.checkpoint import ModelFolder
from ddecode.cli.eval import open_judge
from ddecode.config import DistillConfig, as_yaml, read_config
from ddecode.distillation import distill
from ddecode.evaluation.results import as_json
from ddecode.evaluation.zoo import ZooResult, evaluate
from ddecode.files import write_aside
from ddecode.pairs import make_manifest, write_pairs
from ddecode.pipeline import DistilledPipeline

RECIPE = Path(__file__).parents[1] / "configs" / "fashion-llamagen-ablation.yaml"
SEEN = ("objective.image_batch=64", "objective.own_prefix=0.5")
TOKENS = ("objective.score.guidance=tokens", "objective.score.weight={0.15: 1.0}", "objective.score.lr=4.0e-4")
ADVERSARIAL = ("objective.adversarial.weight=0.3",)
MATCHING = ("objective.matching={weight: {0.1: 1.0}, temperature: 0.5}",)
DD2 = (
    "objective.score.weight={0.08: 1.0}", "objective.score.draws=2", "objective.score.guidance_draws=4",
    "objective.score.lr=8.0e-4", "objective.score.updates=2", "objective.logits=0", "objective.image_batch=64",
    "objective.score.tuning={steps: 60, batch: 128, lr: 1.0e-3, warmup_steps: 15}",
    "objective.score.tuning.precision=bf16", "objective.score.tuning.compile=true", "student.starts=[0]",
    "student.split=null", "student.diffusion_head=3", "student.noise_level=0.4", "student.initial=tuning",
    "training.batch=64", "training.lr=4.0e-4", "training.warmup_steps=20", "training.steps=120",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A run: what it is called, what of the recipe it changes, and the run whose student it starts from."""

    title: str
    overrides: tuple[str, ...] = ()
    begins_from: str | None = None
    pairs: int | None = None


ABLATIONS = {
    "dd1": Ablation(title="DD1"),
    "few": Ablation(title="DD1, a quarter of the pairs", pairs=10240),
    "random": Ablation(title="DD1, not from the teacher's weights", overrides=("student.initial=random",)),
    "half": Ablation(title="DD1, 3 of 6 layers", overrides=("student.depth=3", "training.steps=850")),
    "dd2": Ablation(title="DD2: its own student, from its first stage", overrides=DD2),
    "dd2-mean": Ablation(title="DD2 at its own noise level", overrides=(*DD2, "student.noise_level=1.0")),
    "first": Ablation(title="DD1, half of the time", overrides=("training.steps=230",)),
    "dd1-score": Ablation(
        title="that, then the score term alone",
        overrides=(
            *TOKENS, *SEEN, "objective.logits=0", "objective.score.updates=2", "training.lr=5.0e-5",
            "training.steps=170",
        ),
        begins_from="first",
    ),
    "dd1-adversarial": Ablation(
        title="that, then DD1 + adversarial",
        overrides=(*ADVERSARIAL, *SEEN, "training.lr=4.0e-4", "training.steps=120"), begins_from="first",
    ),
    "all": Ablation(
        title="that, then DD1 + score + adversarial",
        overrides=(*TOKENS, *ADVERSARIAL, *SEEN, "training.lr=2.0e-4", "training.steps=80"), begins_from="first",
    ),
    "dd1-matching": Ablation(
        title="that, then DD1 + matching among tokens",
        overrides=(*MATCHING, *SEEN, "training.lr=4.0e-4", "training.steps=100"), begins_from="first",
    ),
    "energy": Ablation(
        title="that, then DD1 + energy",
        overrides=("objective.energy=10", *SEEN, "training.lr=4.0e-4", "training.steps=120"), begins_from="first",
    ),
    "wavefront": Ablation(
        title="a wavefront along the teacher's tokens instead of DD1's student",
        overrides=(
            "student.split=null", "student.starts=[0, 32]", "student.wavefront=2", "student.draft_steps=4",
            "objective.targets=probabilities", "objective.teacher_forcing=true", "objective.cache_gib=2.6",
            "training.lr=3.0e-3", "training.steps=225",
        ),
    ),
    "fresh": Ablation(
        title="DD1, fresh noise",
        overrides=("objective.fresh_noise=true", "objective.cache_gib=4", "training.steps=250"),
    ),
}  # fmt: skip


def run_of(out: Path, name: str) -> Path:
    """Make the run `name`, and before it those it starts from, unless they are there.

    Returns:
        Its model folder.
    """
    ablation, run = ABLATIONS[name], out / name
    overrides = list(ablation.overrides)
    if ablation.begins_from is not None:
        overrides.append(f"student.initial={run_of(out, ablation.begins_from)}")
    config = read_config(RECIPE, DistillConfig, overrides)
    made = run / "model" / RECIPE_FILE
    if made.is_file() and made.read_text() != as_yaml(config):
        raise SystemExit(f"{run} was made by another recipe: delete it, or choose another --out")
    if not made.is_file():
        print(f"{name}: {ablation.title}", flush=True)
        distill(config, pairs_of(config, out, ablation.pairs), run, resume=True)
    return run / "model"


def pairs_of(config: DistillConfig, out: Path, num: int | None) -> Path:
    """The recipe's pairs, or a folder of only the first `num` of the same."""
    folder = ModelFolder.open(config.teacher)
    pairs = config.pairs if num is None else read_config(RECIPE, DistillConfig, [f"pairs.num={num}"]).pairs
    path = out / f"pairs-{pairs.num}"
    teacher = folder.teacher()
    write_pairs(teacher, make_manifest(teacher, config.teacher, folder.teacher_hash(), pairs), path)
    return path


def minutes(run: Path) -> float:
    """What the steps of a run's log took, over all stages: their median, times their number."""
    total = 0.0
    for log in sorted(run.rglob("log.jsonl")):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        pace = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(rows)]
        total += median(seconds for seconds in pace if seconds > 0) * rows[-1]["step"]
    return total / 60


def compare(models: dict[str, Path], *, num: int, seed: int) -> ZooResult:
    """All students in one and two steps, against the same teacher samples."""
    recipe = read_config(RECIPE, DistillConfig)
    folder = ModelFolder.open(recipe.teacher)
    students = {name: ModelFolder.open(str(path)).student() for name, path in models.items()}
    pipe = DistilledPipeline.from_pretrained(recipe.teacher, others=students)
    length = pipe.length
    texts = [f"{name}:0-{length}" for name in models]
    for name, student in students.items():
        texts += [f"{name}:0-{second},{name}:{second}-{length}" for second in student.starts[1:]]
    plans = {text: pipe.plan(plan=text) for text in texts}
    return evaluate(pipe, plans, open_judge(folder), model=recipe.teacher, num=num, seed=seed)


def table(result: ZooResult, out: Path, models: dict[str, Path]) -> str:
    rows = {row.plan: row for row in result.rows}
    lines = [
        f"protocol zoo, n {result.num} a set, seed {result.seed}, features {result.feature_hash}",
        "",
        "| | E, 1 step | E, 2 steps | ratio | label accuracy | variance | steps | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in models:
        own = [row for text, row in rows.items() if text.partition(":")[0] == name]
        ablation = ABLATIONS[name]
        config = read_config(RECIPE, DistillConfig, ablation.overrides)
        steps, spent = str(config.training.steps), minutes(out / name)
        if ablation.begins_from is not None:
            steps, spent = f"+{steps}", spent + minutes(out / ablation.begins_from)
        figures = [f"{row.control_share:.2%}" for row in own] + ["–"] * (2 - len(own))
        figures.append(" / ".join(f"{row.ratio:.2f}" for row in own))
        figures.append(" / ".join(f"{row.accuracy:.1%}" for row in own))
        figures.append(" / ".join(f"{row.variance:.3f}" for row in own))
        lines.append(f"| {' | '.join([ablation.title, *figures, steps, f'{spent:.1f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(ABLATIONS), action="append", help="may be repeated (default: all)")
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    models = {name: run_of(args.out, name) for name in ABLATIONS if args.only is None or name in args.only}
    result = compare(models, num=args.num, seed=args.seed)
    print(table(result, args.out, models))
    write_aside(args.out / "ablations.json", (as_json(result) + "\n").encode())


if __name__ == "__main__":
    main()
