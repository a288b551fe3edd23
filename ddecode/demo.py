"""The demo: a bundled teacher, real pairs, a short distillation, and a comparison with the bundled student.

Everything it does is what the verbs `pairs`, `distill`, `eval` and `bench` do, at a size for a few minutes on a CPU.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddecode.benchmark import BenchmarkResult, benchmark
from ddecode.checkpoint import ModelFolder, zoo_folder
from ddecode.config import DistillConfig
from ddecode.distillation import distill
from ddecode.evaluation.zoo import Judge, ZooRow, evaluate
from ddecode.files import write_aside
from ddecode.images import grid, png, to_uint8
from ddecode.objective_config import ObjectiveConfig
from ddecode.pairs import make_manifest, write_pairs
from ddecode.pipeline import DistilledPipeline
from ddecode.randomness import sample_generators
from ddecode.report import Report

PICTURED = 40
SHORT = "short"


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo does; the defaults take about five minutes on two cores."""

    pairs: int = 6000
    steps: int = 180
    batch: int = 64
    samples: int = 1500
    repeats: int = 15


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    print(f"\n== {title}", flush=True)
    begin = time.monotonic()
    yield
    print(f"   {time.monotonic() - begin:.0f} s", flush=True)


def short_recipe(config: DistillConfig, size: DemoSize) -> DistillConfig:
    """The bundled student's recipe, cut to the demo's length."""
    training = dataclasses.replace(
        config.training,
        steps=size.steps,
        batch=size.batch,
        warmup_steps=min(20, size.steps),
        ema_decay=0.98,
        compile=False,  # so few steps would not earn the compiler's time back
        save_every=size.steps,
        log_every=20,
        preview_every=max(1, size.steps // 3),
    )
    pairs = dataclasses.replace(config.pairs, num=size.pairs, shard_size=1024)
    # from so few pairs and steps only the logit head gets anywhere, so every position is emitted as a token
    terms = config.objective
    objective = ObjectiveConfig(
        logits=terms.logits,
        drafts=terms.drafts,
        targets=terms.targets,
        teacher_forcing=terms.teacher_forcing,
        cache_gib=1.0,
    )
    student = dataclasses.replace(config.student, split=None, initial="teacher")
    return dataclasses.replace(config, pairs=pairs, training=training, objective=objective, student=student)


def run_demo(config: DistillConfig, out: Path, size: DemoSize, *, seed: int = 0) -> Path:
    """Run the demo into the folder `out`.

    Returns:
        The report, `out/report.html`.

    Raises:
        ValueError: `out` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    folder = ModelFolder.open(config.teacher)
    recipe = short_recipe(config, size)
    bundled = DistilledPipeline.from_pretrained(config.teacher)
    teacher = bundled.teacher
    assert teacher is not None
    judge = Judge.open(zoo_folder() / "features" / str(folder.config["features"]))

    with stage(f"{size.pairs} noise-token pairs from the teacher {folder.path.name}"):
        manifest = make_manifest(teacher, folder.path.name, folder.teacher_hash(), recipe.pairs)
        write_pairs(teacher, manifest, out / "pairs")
    with stage(f"distilling a student for {size.steps} steps of {size.batch}"):
        model = distill(recipe, out / "pairs", out / "run")
    short = DistilledPipeline.from_pretrained(model)
    assert short.student is not None
    both = DistilledPipeline(
        tokenizer=bundled.tokenizer, student=bundled.student, teacher=teacher, others={"short": short.student}
    )

    with stage(f"judging by protocol zoo, {size.samples} samples a set"):
        plans = {"1": both.plan(1), "2": both.plan(2), SHORT: both.plan(plan=f"short:0-{both.length}")}
        judged = evaluate(both, plans, judge, model=folder.path.name, num=size.samples, seed=seed).rows
    with stage(f"timing at batch 1, {size.repeats} repetitions in turn"):
        timing = benchmark(bundled, ["teacher", 1, 2], (1,), repeats=size.repeats)

    rows = name_rows(judged)
    pictures = {
        "teacher": draw(bundled, "teacher", seed),
        "bundled student, 1 step": draw(bundled, 1, seed),
        "bundled student, 2 steps": draw(bundled, 2, seed),
        f"this run's student ({size.steps} steps), 1 step": draw(short, 1, seed),
    }
    for file, images in zip(
        ("teacher", "student-1-step", "student-2-steps", "this-run"), pictures.values(), strict=True
    ):
        write_aside(out / f"{file}.png", png(grid(images, 10, 3)))
    seconds = time.monotonic() - begin
    text = summary(rows, timing)
    print(f"\n{text}\n")
    report = make_report(config, size, rows, timing, pictures, seconds)
    write_aside(out / "report.html", report.html().encode())
    record = {"rows": {name: dataclasses.asdict(row) for name, row in rows.items()}, "timing": timing.as_dict()}
    write_aside(out / "demo.json", (json.dumps(record) + "\n").encode())
    print(f"{seconds / 60:.1f} minutes; pictures and figures: {out / 'report.html'}")
    return out / "report.html"


def name_rows(rows: tuple[ZooRow, ...]) -> dict[str, ZooRow]:
    """The rows under the names that the report uses."""
    by_plan = {row.plan: row for row in rows}
    return {
        "teacher": by_plan["teacher"],
        "independent tokens (control)": by_plan["control"],
        "this run, 1 step": by_plan[SHORT],
        "bundled student, 1 step": by_plan["1"],
        "bundled student, 2 steps": by_plan["2"],
    }


def draw(pipe: DistilledPipeline, steps: int | str, seed: int) -> np.ndarray:
    """uint8 [N,H,W,3]: the same labels and seeds for every model."""
    labels = [i % pipe.num_classes for i in range(PICTURED)]
    generators = sample_generators(seed, range(PICTURED))
    return to_uint8(pipe.decode(pipe.emit(labels, pipe.plan(steps), generators).embeddings_BLC))


HEADER = ["", "passes", "FD to real", "ratio", "E", "label accuracy", "variance"]


def cells(name: str, row: ZooRow) -> list[str]:
    assert row.ratio is not None and row.control_share is not None
    assert row.accuracy is not None and row.variance is not None
    return [
        name,
        str(row.network_evaluations or "-"),
        f"{row.frechet:.2f}",
        f"{row.ratio:.2f}",
        f"{row.control_share:.1%}",
        f"{row.accuracy:.1%}",
        f"{row.variance:.2f}",
    ]


def timing_cells(timing: BenchmarkResult) -> list[list[str]]:
    return [
        [
            "teacher" if row.plan == "teacher" else f"student, {row.plan} step{'s' if row.plan != '1' else ''}",
            f"{row.median_s * 1e3:.1f}",
            f"{row.decode_s / row.median_s:.0%}",
            "-" if row.speedup is None else f"{row.speedup:.1f}x",
        ]
        for row in timing.rows
    ]


TIMING_HEADER = ["", "ms per image", "decoder's share", "speed-up"]


def summary(rows: dict[str, ZooRow], timing: BenchmarkResult) -> str:
    """The figures for the screen."""
    lines = [HEADER, *(cells(name, row) for name, row in rows.items()), [], TIMING_HEADER, *timing_cells(timing)]
    width = max(len(line[0]) for line in lines if line)
    return "\n".join(
        (line[0].ljust(width) + "".join(cell.rjust(16) for cell in line[1:])) if line else "" for line in lines
    )


def make_report(
    config: DistillConfig,
    size: DemoSize,
    rows: dict[str, ZooRow],
    timing: BenchmarkResult,
    pictures: dict[str, np.ndarray],
    seconds: float,
) -> Report:
    report = Report(title=f"{config.teacher}: an AR teacher in one and two steps")
    report.paragraph(
        f"{size.pairs} noise-token pairs were made from the teacher and a student was trained on them for {size.steps} "
        f"steps of {size.batch}; the bundled student is the same method at full length. The whole run took "
        f"{seconds / 60:.1f} minutes on {timing.machine}."
    )
    report.heading("Samples: same labels, same seeds; student rows share their noise")
    report.pictures({name: grid(images, 10, 2) for name, images in pictures.items()})
    report.heading(f"Quality (protocol zoo, {size.samples} samples a set)")
    report.table(HEADER, [cells(name, row) for name, row in rows.items()])
    report.paragraph(
        "FD: Fréchet distance to the real test images in the bundled feature network. E: the share of the "
        "independent-token control's error, 0 for the teacher's own distribution, 1 for tokens that know nothing of "
        "each other. Variance: intra-class feature variance over the teacher's. At so few samples, E is uncertain by "
        "about one point."
    )
    report.heading("Speed at batch 1, noise to 8-bit image, decoder included, fp32")
    report.table(TIMING_HEADER, timing_cells(timing))
    return report
