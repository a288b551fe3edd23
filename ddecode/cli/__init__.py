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
from typing import NoReturn

VERBS = ("demo", "info", "sample", "pairs", "distill", "eval", "compare", "bench", "convert")


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


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
    except (ValueError, OSError, FloatingPointError) as error:
        if args.debug:
            traceback.print_exc()
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += "; make room and run it again"
        print(f"ddecode {args.verb}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ddecode {args.verb}: stopped", file=sys.stderr)
        return 130
    return 0
