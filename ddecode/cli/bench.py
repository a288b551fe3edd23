"""`ddecode bench`: how long teacher, student and mixed plans take, in one run on this machine."""

import argparse
import json
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
    dtype_name,
    named_plans,
)
from ddecode.cli.arguments import MODEL_HELP, WHOLE, add_device, add_with, at_least, open_pipeline, read_steps
from ddecode.files import check_writable, write_aside
from ddecode.latency_plot import draw
from ddecode.machine import machine_name, matmul_rate, thread_count
from ddecode.pipeline import DistilledPipeline, Steps
from ddecode.random_models import LIGHT, SMALL, random_pipeline

DESCRIPTION = f"""\
Time the teacher against its student in one run: noise to uint8 images, decoding included, loading and warm-up apart.
All rows share dtype and threads; the teacher runs with its key-value cache and both halves of guidance in one batch.
Prints what is compared, a table, and one last line of JSON.

With --arch instead of MODEL, the models have a published architecture's sizes and random weights; plans may then name
{SMALL}, the smallest published teacher of the same tokens, and {LIGHT}, a student of fewer layers."""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the program's parser."""
    parser = subparsers.add_parser(
        "bench",
        help="time teacher, student and mixed plans",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument(
        "--arch", metavar="NAME", help="a published architecture with random weights, such as var-d16 or llamagen-l"
    )
    add_with(parser)
    parser.add_argument(
        "--steps", help="numbers of student passes, or teacher, by commas (default teacher,1,2; of captions: teacher)"
    )
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="WHO:START-STOP,...",
        help="measure this plan as well, such as student:0-20,teacher:20-64; may be repeated",
    )
    parser.add_argument(
        "--layers", type=at_least(1), metavar="N", help=f"with --arch: of {LIGHT} (default: half the teacher's)"
    )
    parser.add_argument(
        "--batch", action="append", metavar="N[,N]", help="images of one call; may be repeated (default 1)"
    )
    parser.add_argument(
        "--repeats", type=at_least(1), default=20, help="timed repetitions of each row (default %(default)s)"
    )
    parser.add_argument("--warmup", type=at_least(0), default=3, help="untimed ones before them (default %(default)s)")
    parser.add_argument(
        "--threads", type=at_least(1), help="CPU threads inside an operation (default: torch's own number)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the networks (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the students; see warm-up for its time")
    add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line's JSON here as well")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time against network evaluations")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        ValueError: an argument is wrong; nothing has been measured then.
    """
    steps: list[Steps] = read_steps(args.steps) if args.steps is not None else default_steps(args.arch)
    plans: list[int | str] = [*steps, *args.plan]
    batches = parse_batches(args.batch or ["1"])
    settings = {"repeats": args.repeats, "warmup": args.warmup, "threads": args.threads}
    check_settings(batches, **settings, compiled=args.compile)
    check_files(args)
    pipe = open_models(args, plans).to(args.device, DTYPES[args.dtype])
    names = list(named_plans(pipe, plans))
    with thread_count(args.threads):
        rate = matmul_rate(pipe.device, pipe.dtype)
        print(headline(args, pipe, names, rate), flush=True)
    result = benchmark(pipe, plans, batches, **settings, compiled=args.compile, rate=rate)
    print(table(result))
    line = json.dumps({"model": args.model or args.arch, **result.as_dict()}, allow_nan=False)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_aside(args.json, f"{line}\n".encode())
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        write_aside(args.plot, draw(result, args.model or args.arch))
    print(line)


def default_steps(arch: str | None) -> list[Steps]:
    """What is measured where nothing is asked for; of captions there is no student."""
    return ["teacher"] if arch is not None and "-t2i-" in arch else ["teacher", 1, 2]


def check_files(args: argparse.Namespace) -> None:
    """Refuse output files that could not be written, before the work that they are for.

    Raises:
        ValueError: see `check_writable`; or the plot is no PNG.
    """
    for option in ("json", "plot"):
        if (path := getattr(args, option)) is not None:
            check_writable(path, f"--{option}")
    if args.plot is not None and args.plot.suffix != ".png":
        raise ValueError(f"--plot writes a .png, got {str(args.plot)!r}")


def open_models(args: argparse.Namespace, plans: Sequence[int | str]) -> DistilledPipeline:
    """MODEL, or random weights for `--arch`.

    Raises:
        ValueError: neither or both are given, options are for the other one, or see `open_pipeline`.
    """
    if (args.model is None) == (args.arch is None):
        raise ValueError("give a MODEL or --arch, one of them")
    if args.arch is None:
        if args.layers is not None:
            raise ValueError("--layers is for --arch; of a MODEL, --with NAME=MODEL#student brings another student")
        return open_pipeline(args)
    if args.others:
        raise ValueError(f"--with is for a MODEL; with --arch plans know teacher, student, {SMALL} and {LIGHT}")
    return random_pipeline(args.arch, plans, layers=args.layers, dtype=DTYPES[args.dtype])


def parse_batches(texts: Sequence[str]) -> list[int]:
    """`["1", "8,64"]` to batch sizes.

    Raises:
        ValueError: a part is no whole number of at least 1.
    """
    return [whole_number(part, "--batch takes numbers of at least 1") for text in texts for part in text.split(",")]


def whole_number(text: str, rule: str) -> int:
    """A number of at least 1, or a `ValueError` that states the rule."""
    if not WHOLE.fullmatch(text.strip()) or int(text) < 1:
        raise ValueError(f"{rule}; got {text.strip()!r}")
    return int(text)


def headline(args: argparse.Namespace, pipe: DistilledPipeline, names: Sequence[str], rate: float) -> str:
    """What is compared with what, where, and what the timing holds."""
    others = ", ".join(name if ":" in name else f"student {name}" for name in names if name != "teacher")
    if "teacher" not in names:
        compared = f"{others}, without the teacher and so without speed-ups"
    else:
        compared = teacher_title(pipe) + (f" against {others}" if others else "")
    threads, dtype = torch.get_num_threads(), dtype_name(pipe.dtype)
    title = args.model or f"{args.arch} with random weights"
    return (
        f"{title}: {compared}; from noise to uint8 images, decoding included; {dtype}, "
        f"{'compiled' if args.compile else 'eager'}, {pipe.device.type} {machine_name(pipe.device)}, "
        f"{threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}; "
        f"a large matrix product here: {rate / 1e9:.0f} GFLOP/s; "
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


HEADER = (
    "plan", "batch", "passes", "median ms", "p10 - p90", "network", "decode", "rest", "img/s", "peak MiB",
    "GFLOP/s", "of matmul", "decode", "of matmul", "floor ms", "warm-up ms", "",
)  # fmt: skip
"""Of the table; GFLOP/s and their share of the matrix product's are the networks', then the decoder's."""


def table(result: BenchmarkResult) -> str:
    """The rows for people; times in milliseconds for a whole batch, memory in MiB."""
    lines = [HEADER, *(cells(row) for row in result.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    padded = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def cells(row: BenchmarkRow) -> tuple[str, ...]:
    """One line of the table; of the warm-up the first repetition, which compiles, and the sum of the others."""
    return (
        row.plan,
        str(row.batch),
        str(row.network_evaluations),
        f"{row.median_s * 1e3:.1f}",
        f"{row.p10_s * 1e3:.1f} - {row.p90_s * 1e3:.1f}",
        f"{row.network_s * 1e3:.1f}",
        f"{row.decode_s * 1e3:.1f}",
        f"{row.rest_s * 1e3:.1f}",
        f"{row.images_per_s:.1f}",
        f"{row.peak_bytes / 2**20:.0f}",
        f"{row.network_rate / 1e9:.1f}",
        f"{row.network_share:.0%}",
        f"{row.decode_rate / 1e9:.1f}",
        f"{row.decode_share:.0%}",
        f"{row.floor_s * 1e3:.1f}",
        " + ".join(f"{seconds * 1e3:.0f}" for seconds in (*row.warmup_s[:1], sum(row.warmup_s[1:]))),
        "" if row.speedup is None else f"{row.speedup:.1f}x",
    )
