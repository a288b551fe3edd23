"""`ddecode pairs`: walk the teacher along noise sequences and keep the noise-token pairs."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ddecode.checkpoint import ModelFolder
from ddecode.cli.arguments import add_config, at_least
from ddecode.config import DistillConfig, read_config
from ddecode.forecast import forecast
from ddecode.pairs import make_manifest, write_pairs
from ddecode.processes import launch


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("pairs", help="make noise-token pairs from a teacher", description=__doc__)
    add_config(parser)
    parser.add_argument("--out", type=Path, help="folder of shards; run again to go on")
    parser.add_argument("--num", type=at_least(1), help="pairs in all (default: the recipe's)")
    parser.add_argument("--dry-run", action="store_true", help="only measure what it will cost on this machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.out is None and not args.dry_run:
        raise ValueError("give --out FOLDER for the pairs, or --dry-run to see what they will cost")
    recipe = read_config(args.config, DistillConfig, args.overrides)
    config = recipe.pairs if args.num is None else dataclasses.replace(recipe.pairs, num=args.num)
    folder = ModelFolder.open(recipe.teacher)
    state = launch()
    teacher = folder.teacher().to(state.device)
    manifest = make_manifest(teacher, folder.path.name, folder.teacher_hash(), config)
    if args.dry_run:
        print(forecast(teacher, manifest))
        return
    made = write_pairs(teacher, manifest, args.out)
    if state.is_main_process:
        print(f"{manifest.num} pairs in {args.out} ({made} made now)")
