"""Arguments that several verbs share, and how their text is read."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from ddecode.arguments import MOST, check_whole, shown
from ddecode.checkpoint import ModelFolder
from ddecode.pipeline import DistilledPipeline, Steps
from ddecode.plan import NAME
from ddecode.precision import check_device
from ddecode.processes import launch
from ddecode.sampling import Model

WHOLE = re.compile(r"[0-9]{1,20}")
"""A whole number that somebody may mean: neither of a thousand digits nor of another script's."""
MODEL_HELP = "a bundled model's name, a model folder or a hub id (owner/name)"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def model_name(model: str) -> str:
    """For the record: a folder's name, or what a bundled model or one of the hub is called."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


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
    """An argparse type: a device that is there; of a launch's processes each has a `cuda` of its own."""
    try:
        check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return launch().device if text == "cuda" else torch.device(text)


def open_pipeline(args: argparse.Namespace) -> DistilledPipeline:
    """MODEL with those of `--with`.

    Raises:
        ValueError: one cannot be loaded, has other tokens, or takes captions instead of class labels.
    """
    others = [read_other(text) for text in args.others]
    names = [name for name, _ in others]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--with gives {twice[0]} twice; call one otherwise")
    pipe = DistilledPipeline.from_pretrained(args.model, others=dict(others))
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


def at_least(lowest: int, highest: int = MOST) -> Any:
    """An argparse type: an int of at least `lowest`."""

    def read(text: str) -> int:
        if not WHOLE.fullmatch(text.removeprefix("-")):
            raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number")
        try:
            check_whole("it", value := int(text), lowest, highest)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("it ")) from None
        return value

    return read


def read_step(text: str) -> Steps:
    """`teacher`, or a number of student passes.

    Raises:
        ValueError: it is neither.
    """
    if text.strip() == "teacher":
        return "teacher"
    if not WHOLE.fullmatch(text.strip()) or int(text) < 1:
        raise ValueError(f"steps must be whole numbers of at least 1, or 'teacher', got {shown(text.strip())}")
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
        if not WHOLE.fullmatch(part.strip()):
            raise ValueError(f"--classes must be comma-separated class numbers, got {shown(part.strip())}")
        classes.append(int(part))
    if wrong := [c for c in classes if c >= num_classes]:
        raise ValueError(f"class {wrong[0]} is out of range: this model knows 0..{num_classes - 1}")
    return classes
