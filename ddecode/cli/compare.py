"""`ddecode compare`: results of one protocol side by side; across protocols it is refused."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.evaluation.results import compare, read_result


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("compare", help="results of ddecode eval side by side", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULT.json", type=Path, help="written by ddecode eval --json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    print(compare({str(path): read_result(path) for path in args.results}))
