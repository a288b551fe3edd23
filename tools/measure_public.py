"""Our samplers beside the public code's: the same random weights, one image at a time, decoding included, in one run.

    .venv/bin/python tools/measure_public.py --arch var-d16 --var VAR --distilled-decoding DD
    .venv/bin/python tools/measure_public.py --arch llamagen-l --llamagen LLAMAGEN --distilled-decoding DD

VAR, LLAMAGEN and DD are clones of FoundationVision/VAR, FoundationVision/LlamaGen and microsoft/distilled_decoding.
Their code is imported as it is, in processes of its own, and called as its sampling scripts call it; rows without a
clone are left out. Teachers sample as their authors do for the figures they publish, students in one step.

Rows take turns, and every repetition begins with another one. The first image of each is its warm-up, and is reported
apart; a LlamaGen teacher of the public code warms up on its first tokens alone. Times end with the decoder's output
(ours: with 8-bit arrays). Pictures are compared by their mean absolute difference, as a share of the range of 8 bits.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from public_code import LABEL, SEED, Sampler, public_samplers

from ddecode.conversion import adapter_of
from ddecode.machine import machine_name
from ddecode.pipeline import DistilledPipeline
from third_party_loaders import load_dd1_student, load_llamagen, load_var
from third_party_loaders.published import (
    Architecture,
    find,
    random_student,
    random_teacher,
    random_tokenizer,
)

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
"""Of our networks and our decoder."""
WARM_UP = "warm-up/"
PUBLIC_TEACHER, PUBLIC_STUDENT = "public teacher", "public DD1 student, 1 step"
PUBLIC = {"teacher": PUBLIC_TEACHER, "student": PUBLIC_STUDENT}
EXACT_STUDENT = "our student, 1 step, fp32, eager"
"""Whose pictures the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to the image."""

    name: str
    process: str
    """Which process samples it: `public-teacher`, `public-student`, or `ours-DTYPE-eager|compiled` (see `DTYPES`)."""
    steps: str
    """`teacher` or a number of student passes."""


def all_rows(*, compiled: bool) -> list[Row]:
    """What can be measured, the public rows first; with `compiled`, our student compiled as well."""
    rows = [
        Row(name=PUBLIC_TEACHER, process="public-teacher", steps="teacher"),
        Row(name=PUBLIC_STUDENT, process="public-student", steps="1"),
    ]
    for mode in ("eager", "compiled") if compiled else ("eager",):
        for dtype in DTYPES:
            process = f"ours-{dtype}-{mode}"
            if mode == "eager" and dtype != "mixed":
                rows.append(Row(name=f"our teacher, {dtype}", process=process, steps="teacher"))
            rows.append(Row(name=f"our student, 1 step, {dtype}, {mode}", process=process, steps="1"))
    return rows


# --- the same weights for all --------------------------------------------------------------------------------------


def write_weights(architecture: Architecture, folder: Path) -> None:
    """Random weights in upstream's layouts, and the noise that students begin with."""
    generator, family = torch.Generator().manual_seed(SEED), architecture.family
    tokenizer = random_tokenizer(architecture, generator)
    teacher = random_teacher(architecture, tokenizer, generator)
    student = random_student(teacher, generator)
    parts: dict[str, tuple[str, Any, Any]] = {
        "tokenizer": (f"{family}-tokenizer", tokenizer, architecture.tokenizer),
        "teacher": (family, teacher.backbone, architecture.backbone),
        "student": (f"dd1-{family}", student, student.backbone.config),
    }
    for name, (kind, module, config) in parts.items():
        torch.save(adapter_of(kind).upstream(module.state_dict(), config), folder / f"{name}.pth")
    noise_LC = torch.randn(teacher.length, teacher.codebook_VC.shape[1], generator=own_generator())
    torch.save({"noise_1LC": noise_LC[None], "split": student.options()["split"]}, folder / "noise.pth")


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


# --- samplers ------------------------------------------------------------------------------------------------------


def our_samplers(architecture: Architecture, folder: Path, dtype: str, *, compiled: bool) -> dict[str, Sampler]:
    """Teacher and student through the pipeline, as a user calls it."""
    of_networks, of_decoder = DTYPES[dtype]
    loaded = load_var if architecture.family == "var" else load_llamagen
    teacher = loaded(folder / "teacher.pth", folder / "tokenizer.pth")
    split = torch.load(folder / "noise.pth")["split"]
    student = load_dd1_student(folder / "student.pth", teacher.tokenizer, architecture.family, split=split)  # type: ignore[arg-type]
    pipe = DistilledPipeline(
        tokenizer=teacher.tokenizer, teacher=teacher, student=student, recipe=architecture.recipe
    ).to(of_networks)
    pipe.tokenizer.decoder.to(of_decoder)  # type: ignore[attr-defined]
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.compile()

    def sample(steps: Any) -> np.ndarray:
        return pipe([LABEL], num_inference_steps=steps, generator=own_generator(), output_type="np").images[0]

    return {"teacher": lambda: sample("teacher"), "1": lambda: sample(1)}


# --- processes ---------------------------------------------------------------------------------------------------


def serve(process: str, architecture: Architecture, folder: Path, clone: Path | None) -> None:
    """Sample an image for each line of standard input, which names steps and a file; answer with its seconds."""
    answers = sys.stdout
    with redirect_stdout(sys.stderr), torch.no_grad():
        if process.startswith("ours-"):
            _, dtype, mode = process.split("-")
            samplers = our_samplers(architecture, folder, dtype, compiled=mode == "compiled")
        else:
            assert clone is not None
            samplers = public_samplers(process, architecture, folder, clone)
        for line in sys.stdin:
            asked, path = line.strip().split(maxsplit=1)
            sample = samplers.get(asked) or samplers[asked.removeprefix(WARM_UP)]
            begin = time.perf_counter()
            image = sample()
            seconds = time.perf_counter() - begin
            np.save(path, image)
            print(seconds, file=answers, flush=True)


class Worker:
    """A process that samples one image after the other."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def sample(self, steps: str, picture: Path) -> float:
        """Seconds of one image, which is written to `picture`.

        Raises:
            RuntimeError: the process has ended; its last words.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{steps} {picture}\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args!r} ended:\n{self.log.read_text()[-2000:]}")
        return float(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


# --- measuring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of a row."""

    warmup_s: float
    seconds: list[float]
    picture: np.ndarray
    """Of its last image, uint8 [H,W,3]."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def measure(
    rows: Sequence[Row], sample: Callable[[Row, str, Path], float], folder: Path, *, repeats: int, teacher_repeats: int
) -> dict[Row, Measured]:
    """Let the rows take turns.

    Args:
        rows: what to measure.
        sample: seconds of one image of a row with these steps, written to this file.
        folder: for the pictures.
        repeats, teacher_repeats: images of each row of students and of teachers, warm-up apart.
    """
    pictures = {row: folder / f"{index}.npy" for index, row in enumerate(rows)}
    warmup_s = {row: sample(row, WARM_UP + row.steps, pictures[row]) for row in rows}
    seconds: dict[Row, list[float]] = {row: [] for row in rows}
    for repeat in range(max(repeats, teacher_repeats)):
        first = repeat % len(rows)
        for row in [*rows[first:], *rows[:first]]:
            if repeat < (teacher_repeats if row.steps == "teacher" else repeats):
                seconds[row].append(sample(row, row.steps, pictures[row]))
    return {row: Measured(warmup_s=warmup_s[row], seconds=seconds[row], picture=np.load(pictures[row])) for row in rows}


def report(measured: dict[Row, Measured]) -> list[dict[str, Any]]:
    """Medians and what they are compared with; None where that was not measured."""
    by_name = {row.name: found for row, found in measured.items()}
    public = {who: by_name.get(name) for who, name in PUBLIC.items()}
    exact = by_name.get(EXACT_STUDENT)
    return [
        {
            "row": row.name,
            "median_s": found.median_s,
            "min_s": min(found.seconds),
            "max_s": max(found.seconds),
            "images": len(found.seconds),
            "warmup_s": found.warmup_s,
            **{f"over_public_{who}": other and other.median_s / found.median_s for who, other in public.items()},
            "picture_difference": difference(found.picture, exact.picture) if exact and row.steps == "1" else None,
        }
        for row, found in measured.items()
    ]


def difference(picture: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two 8-bit pictures, as a share of their range."""
    return float(np.abs(picture.astype(np.float64) - other).mean() / 255)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The report in Markdown."""
    head = ("", "median s (least - most)", "images", "warm-up s", "over public teacher", "over public DD1", "picture")
    body = [
        (
            line["row"],
            f"{line['median_s']:.3f} ({line['min_s']:.3f} - {line['max_s']:.3f})",
            str(line["images"]),
            f"{line['warmup_s']:.1f}",
            *(
                "" if line[key] is None else f"{line[key]:.2f}x"
                for key in ("over_public_teacher", "over_public_student")
            ),
            "" if line["picture_difference"] is None else f"{line['picture_difference']:.2%}",
        )
        for line in lines
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *body))


def main() -> None:
    args = read_arguments()
    architecture = find(args.arch)
    if args.serve:
        serve(args.serve, architecture, args.weights, args.clone)
        return
    clones = {"public-teacher": getattr(args, architecture.family), "public-student": args.distilled_decoding}
    every = [row for row in all_rows(compiled=args.compile) if clones.get(row.process, ".") is not None]
    rows = [row for row in every if args.only in row.name]
    if not rows:
        sys.exit(f"no row has {args.only!r} in its name; there are {', '.join(row.name for row in every)}")
    print(
        f"{args.arch}, random weights: {', '.join(row.name for row in rows)}; batch 1, decoding included, "
        f"{machine_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as open_workers:
        weights = args.weights or Path(scratch)
        if not (weights / "noise.pth").is_file():
            weights.mkdir(parents=True, exist_ok=True)
            write_weights(architecture, weights)
        workers: dict[str, Worker] = {}
        for process in dict.fromkeys(row.process for row in rows):
            command = [sys.executable, __file__, "--arch", args.arch, "--weights", weights, "--serve", process]
            if process in clones:
                command += ["--clone", clones[process]]
            workers[process] = Worker(list(map(str, command)), Path(scratch) / f"{process}.log")
            open_workers.callback(workers[process].close)

        def sample(row: Row, steps: str, picture: Path) -> float:
            seconds = workers[row.process].sample(steps, picture)
            print(f"{row.name}, {steps}: {seconds:.3f} s", file=sys.stderr, flush=True)
            return seconds

        repeats = {"repeats": args.repeats, "teacher_repeats": args.teacher_repeats}
        measured = measure(rows, sample, Path(scratch), **repeats)
    lines = report(measured)
    print(table(lines))
    print(json.dumps({"arch": args.arch, "rows": lines}))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--arch", default="var-d16", help="a published architecture with class labels (%(default)s)")
    parser.add_argument("--var", type=Path, help="a clone of FoundationVision/VAR")
    parser.add_argument("--llamagen", type=Path, help="a clone of FoundationVision/LlamaGen")
    parser.add_argument("--distilled-decoding", type=Path, help="a clone of microsoft/distilled_decoding")
    parser.add_argument("--repeats", type=int, default=5, help="images of each student (%(default)s)")
    parser.add_argument("--teacher-repeats", type=int, default=3, help="images of each teacher (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their names")
    parser.add_argument("--compile", action="store_true", help="measure our student compiled as well")
    parser.add_argument("--weights", type=Path, help="keep the random weights in this folder, or take those there")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--clone", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        architecture = find(args.arch)
    except ValueError as error:
        parser.error(str(error))
    if not architecture.backbone.num_classes:
        parser.error(f"{args.arch} takes captions: there is no public student of it")
    for clone in (args.var, args.llamagen, args.distilled_decoding):
        if clone is not None and not clone.is_dir():
            parser.error(f"{clone} is no folder")
    if min(args.repeats, args.teacher_repeats) < 1:
        parser.error("--repeats and --teacher-repeats take numbers of at least 1")
    return args


if __name__ == "__main__":
    main()
