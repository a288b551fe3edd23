"""The command line: one module per verb, one line per mistake.

A mistake of the user's (`ValueError`, an operating-system error, wrong arguments) is one line on stderr and exit
status 2; `--debug` shows the traceback.
"""

import argparse
import errno
import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ddecode.processes import is_lost

VERBS = ("demo", "info", "sample", "train", "pairs", "distill", "eval", "compare", "bench", "convert", "card")
LONGEST = 400
"""Characters of a message."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, read_path)

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {brief(message)} (see {self.prog} --help)")
        sys.exit(2)


def read_path(text: str) -> Path:
    """How arguments of the type `Path` are read: an empty text would be the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return Path(text)


def brief(message: str) -> str:
    """A message on one line, which a long path or name does not fill a screen with."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def say(line: str) -> None:
    print(line, file=sys.stderr)


def build_parser() -> Parser:
    parser = Parser(prog="ddecode", description="Distil an image auto-regressive model into one or two steps.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for verb in VERBS:
        importlib.import_module(f"ddecode.cli.{verb}").add_parser(verbs)
    for choice in verbs.choices.values():
        choice.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    args = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    try:
        args.run(args)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if not is_mistake(error):
            raise
        if args.debug:
            traceback.print_exc()
        say(f"ddecode {args.verb}: error: {brief(said(error))}")
        return 2
    except KeyboardInterrupt:
        say(f"ddecode {args.verb}: stopped")
        return 130
    return 0


def is_mistake(error: Exception) -> bool:
    """Whether it can be mended by who gave the command. Other errors of torch's are ours."""
    return not isinstance(error, RuntimeError) or is_out_of_memory(error) or is_lost(error) or is_uncompilable(error)


def is_out_of_memory(error: Exception) -> bool:
    """Also where torch says so in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_uncompilable(error: Exception) -> bool:
    """Whether `torch.compile` lacks what it compiles with."""
    return "No working C++ compiler" in str(error)


def said(error: Exception) -> str:
    """What an error says, and how to mend it where that is not in its words."""
    if is_lost(error):
        return "another process of the launch has ended"
    if is_uncompilable(error):
        return "torch.compile finds no C++ compiler here: install one, or leave it off (training.compile=false)"
    if is_out_of_memory(error):
        return "there is not enough memory for this; take smaller batches or fewer at once"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}; make room and run it again"
    return str(error)
