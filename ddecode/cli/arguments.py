"""Arguments that several verbs share, and how their text is read."""

import argparse
from pathlib import Path
from typing import Any

import torch

from ddecode.checkpoint import ModelFolder
from ddecode.pipeline import DistilledPipeline, Steps
from ddecode.plan import NAME
from ddecode.sampling import Model

MODEL_HELP = "a bundled model's name, a model folder or a hub id (owner/name)"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_with(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="let plans call MODEL's teacher NAME (MODEL#student: its student); may be repeated",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=read_device, default="cpu", help="where networks run, such as cuda:0")


def read_device(text: str) -> torch.device:
    """An argparse type: a device that is there."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here") from None


def open_pipeline(args: argparse.Namespace) -> DistilledPipeline:
    """MODEL with those of `--with`.

    Raises:
        ValueError: one cannot be loaded, has other tokens, or takes captions instead of class labels.
    """
    pipe = DistilledPipeline.from_pretrained(args.model, others=dict(read_other(text) for text in args.others))
    if not pipe.num_classes:
        raise ValueError(f"{args.model} takes captions, not class labels: sample it from Python, with Teacher.generate")
    return pipe


def read_other(text: str) -> tuple[str, Model]:
    """`NAME=MODEL` or `NAME=MODEL#student` to a model by its name in plans."""
    name, found, source = text.partition("=")
    if not found or not NAME.fullmatch(name):
        raise ValueError(f"--with takes NAME=MODEL, got {text!r}")
    model, _, part = source.partition("#")
    if part not in ("", "teacher", "student"):
        raise ValueError(f"--with {text}: a model's part is teacher or student, got {part!r}")
    folder = ModelFolder.open(model)
    return name, folder.student() if part == "student" else folder.teacher()


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override a key of the recipe")


def at_least(lowest: int) -> Any:
    """An argparse type: an int of at least `lowest`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return read


def read_step(text: str) -> Steps:
    """`teacher`, or a number of student passes.

    Raises:
        ValueError: it is neither.
    """
    if text.strip() == "teacher":
        return "teacher"
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"steps must be whole numbers of at least 1, or 'teacher', got {text.strip()!r}")
    return int(text)


def read_steps(text: str) -> list[Steps]:
    """Comma-separated `read_step`s."""
    return [read_step(part) for part in text.split(",")]


def read_classes(text: str, num_classes: int) -> list[int]:
    """Comma-separated class labels.

    Raises:
        ValueError: one is no number or out of range.
    """
    classes = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise ValueError(f"--classes must be comma-separated class numbers, got {part.strip()!r}")
        classes.append(int(part))
    if wrong := [c for c in classes if c >= num_classes]:
        raise ValueError(f"class {wrong[0]} is out of range: this model knows 0..{num_classes - 1}")
    return classes
