"""`ddecode distill`: train a student on noise-token pairs."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.cli.arguments import add_config
from ddecode.config import DistillConfig, read_config
from ddecode.distillation import distill
from ddecode.forecast import forecast_training
from ddecode.processes import rank


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("distill", help="train a student on pairs", description=__doc__)
    add_config(parser)
    parser.add_argument("--pairs", type=Path, required=True, help="folder made by ddecode pairs")
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="only measure what it will cost on this machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.out is None and not args.dry_run:
        raise ValueError("give --out FOLDER for the run, or --dry-run to see what it will cost")
    config = read_config(args.config, DistillConfig, args.overrides)
    if args.dry_run:
        print(forecast_training(config, args.pairs))
        return
    model = distill(config, args.pairs, args.out, resume=args.resume)
    if rank() == 0:
        print(f"student -> {model}")
