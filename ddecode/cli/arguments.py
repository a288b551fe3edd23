"""Arguments that several verbs share, and how their text is read."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.pipeline import Steps

MODEL_HELP = "a bundled model's name, a model folder or a hub id (owner/name)"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


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
