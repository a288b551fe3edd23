"""`ddecode distill`: train a student on noise-token pairs."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.cli.arguments import add_config
from ddecode.config import DistillConfig, read_config
from ddecode.distillation import distill


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("distill", help="train a student on pairs", description=__doc__)
    add_config(parser)
    parser.add_argument("--pairs", type=Path, required=True, help="folder made by ddecode pairs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    config = read_config(args.config, DistillConfig, args.overrides)
    model = distill(config, args.pairs, args.out, resume=args.resume)
    print(f"student -> {model}")
