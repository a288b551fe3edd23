"""`ddecode bench`: how long teacher, student and mixed plans take, in one run on this machine."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddecode.benchmark import (
    DTYPES,
    BenchmarkResult,
    BenchmarkRow,
    benchmark,
    check_settings,
    machine_name,
    named_plans,
)
from ddecode.cli.arguments import add_model, add_with, open_pipeline, read_steps
from ddecode.files import write_aside
from ddecode.pipeline import DistilledPipeline

DESCRIPTION = """\
Time the teacher against its student in one run: noise to uint8 images, decoding included, loading and warm-up apart.
All rows share dtype and threads; the teacher runs with its key-value cache and both halves of guidance in one batch.
Prints what is compared, a table, and one last line of JSON."""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the program's parser."""
    parser = subparsers.add_parser(
        "bench",
        help="time teacher, student and mixed plans",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_with(parser)
    parser.add_argument(
        "--steps", default="teacher,1,2", help="numbers of student passes, or teacher, by commas (default %(default)s)"
    )
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="WHO:START-STOP,...",
        help="measure this plan as well, such as student:0-20,teacher:20-64; may be repeated",
    )
    parser.add_argument(
        "--batch", action="append", metavar="N[,N]", help="images of one call; may be repeated (default 1)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed repetitions of each row (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed ones before them (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads inside an operation (default: torch's own number)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line's JSON here as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        ValueError: an argument is wrong; nothing has been measured then.
    """
    plans: list[int | str] = [*read_steps(args.steps), *args.plan]
    batches = parse_batches(args.batch or ["1"])
    settings = {"repeats": args.repeats, "warmup": args.warmup, "dtype": args.dtype, "threads": args.threads}
    check_settings(batches, **settings)
    if args.json is not None:
        check_writable(args.json)
    pipe = open_pipeline(args)
    names = list(named_plans(pipe, plans))
    print(headline(args, pipe, names), flush=True)
    result = benchmark(pipe, plans, batches, **settings)
    print(table(result))
    line = json.dumps({"model": args.model, **result.as_dict()}, allow_nan=False)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_aside(args.json, f"{line}\n".encode())
    print(line)


def parse_batches(texts: Sequence[str]) -> list[int]:
    """`["1", "8,64"]` to batch sizes.

    Raises:
        ValueError: a part is no whole number of at least 1.
    """
    return [whole_number(part, "--batch takes numbers of at least 1") for text in texts for part in text.split(",")]


def whole_number(text: str, rule: str) -> int:
    """A number of at least 1, or a `ValueError` that states the rule."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{rule}; got {text.strip()!r}")
    return int(text)


def headline(args: argparse.Namespace, pipe: DistilledPipeline, names: Sequence[str]) -> str:
    """What is compared with what, where, and what the timing holds."""
    others = ", ".join(name if ":" in name else f"student {name}" for name in names if name != "teacher")
    if "teacher" not in names:
        compared = f"{others}, without the teacher and so without speed-ups"
    else:
        compared = teacher_title(pipe) + (f" against {others}" if others else "")
    device = pipe.any_model.device
    threads = args.threads or torch.get_num_threads()
    return (
        f"{args.model}: {compared}; from noise to uint8 images, decoding included; {args.dtype}, {device.type} "
        f"{machine_name(device)}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}; "
        f"median of {args.repeats} after {args.warmup} to warm up"
    )


def teacher_title(pipe: DistilledPipeline) -> str:
    """How the teacher's row samples."""
    assert pipe.teacher is not None
    recipe, backbone = pipe.recipe, pipe.teacher.backbone
    guided = any(backbone.guidance_weight(recipe.guidance_scale, step) > 0 for step in range(len(backbone.steps)))
    guidance = f"guidance {recipe.guidance_scale:g} with both halves in one batch" if guided else "no guidance"
    top_p = "off" if recipe.top_p == 1 else f"{recipe.top_p:g}"
    return f"teacher (cached, {guidance}, top-k {recipe.top_k or 'off'}, top-p {top_p})"


def table(result: BenchmarkResult) -> str:
    """The rows for people; times in milliseconds for a whole batch, memory in MiB."""
    header = (
        "plan",
        "batch",
        "passes",
        "median ms",
        "p10 - p90",
        "network",
        "decode",
        "share",
        "img/s",
        "peak MiB",
        "",
    )
    lines = [header, *(cells(row) for row in result.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def cells(row: BenchmarkRow) -> tuple[str, ...]:
    """One line of the table; `share` is the decoder's part of the median."""
    return (
        row.plan,
        str(row.batch),
        str(row.network_evaluations),
        f"{row.median_s * 1e3:.1f}",
        f"{row.p10_s * 1e3:.1f} - {row.p90_s * 1e3:.1f}",
        f"{row.network_s * 1e3:.1f}",
        f"{row.decode_s * 1e3:.1f}",
        f"{row.decode_s / row.median_s:.0%}",
        f"{row.images_per_s:.1f}",
        f"{row.peak_bytes / 2**20:.0f}",
        "" if row.speedup is None else f"{row.speedup:.1f}x",
    )


def check_writable(path: Path) -> None:
    """Refuse an output file that could not be written, before the work that it is for.

    Raises:
        ValueError: it is a folder, or lies where none can be made.
    """
    if path.is_dir():
        raise ValueError(f"--json names a folder, {path}; give a file")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--json {path}: cannot write in {existing}")
