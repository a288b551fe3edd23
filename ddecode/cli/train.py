"""`ddecode train`: make a teacher of a folder of images, with its tokenizer and the network that judges it."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.cli.arguments import add_config
from ddecode.config import DistillConfig, build, read_config
from ddecode.own_teacher import OwnTeacherConfig, train_teacher


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("train", help="make a teacher of your own images", description=__doc__)
    add_config(parser)
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of images; sub-folders, if there are any, are the classes"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the teacher will be in OUT/model")
    parser.add_argument("--resume", action="store_true", help="go on from what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    recipe = read_config(args.config, DistillConfig, args.overrides)
    if not recipe.own_teacher:
        raise ValueError(f"{args.config} says nothing of own_teacher; begin with configs/own-images.yaml")
    config = build(OwnTeacherConfig, recipe.own_teacher, "own_teacher")
    model = args.out / "model"
    if Path(recipe.teacher) != model:
        raise ValueError(
            f"{args.config} names the teacher {recipe.teacher}, and this run would write {model}: "
            f"add teacher={model}, here and for pairs and distill"
        )
    train_teacher(config, args.images, args.out, resume=args.resume)
    print(f"teacher -> {model}")
