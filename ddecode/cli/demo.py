"""`ddecode demo`: from a bundled teacher to a one-step student in a few minutes, with a report."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.checkpoint import ModelFolder, zoo_folder
from ddecode.cli.arguments import at_least
from ddecode.config import DistillConfig, read_config
from ddecode.demo import DemoSize, run_demo


def add_parser(verbs: Any) -> None:
    size = DemoSize()
    parser = verbs.add_parser("demo", help="see it work, in a few minutes", description=__doc__)
    parser.add_argument("--model", default="fashion-llamagen", help="a bundled model (default: fashion-llamagen)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report (default: demo)")
    parser.add_argument("--pairs", type=at_least(1), default=size.pairs)
    parser.add_argument("--steps", type=at_least(1), default=size.steps)
    parser.add_argument("--samples", type=at_least(20), default=size.samples)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    folder = ModelFolder.open(args.model)
    recipe = folder.path / "recipe.yaml"
    if folder.path.parent != zoo_folder() or not recipe.is_file():
        raise ValueError(f"the demo needs a bundled model with its recipe; {args.model} is none")
    config = read_config(recipe, DistillConfig)
    run_demo(config, args.out, DemoSize(pairs=args.pairs, steps=args.steps, samples=args.samples))
