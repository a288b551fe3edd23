"""`ddecode card`: a model folder's README.md for the hub, and its way there."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.card import Card, sizes, write_card
from ddecode.checkpoint import ModelFolder, upload

DESCRIPTION = """\
Writes README.md into a model folder: what the model is, how to use it, its licences, the recipe.yaml that ddecode
distill left in it, and figures of ddecode eval --json."""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("card", help="write a model's card, and push it to the hub", description=DESCRIPTION)
    parser.add_argument("model", metavar="FOLDER", type=Path, help="a model folder, such as RUN/model")
    parser.add_argument("--license", required=True, help="of these weights, as hubs name it: mit, cc-by-nc-4.0, ...")
    parser.add_argument("--teacher", required=True, help="the model it was distilled from, a hub id or in words")
    parser.add_argument("--teacher-license", required=True, metavar="LICENSE", help="of the teacher")
    parser.add_argument("--dataset", action="append", default=[], metavar="ID", help="of the teacher; may be repeated")
    parser.add_argument("--recipe", type=Path, help="YAML of the distillation (default: the folder's recipe.yaml)")
    parser.add_argument("--metrics", type=Path, metavar="RESULT.json", help="written by ddecode eval --json")
    parser.add_argument("--name", metavar="OWNER/NAME", help="what people will load it by (default: the folder)")
    parser.add_argument("--push", action="store_true", help="then upload the folder to the hub as --name")
    parser.add_argument("--private", action="store_true", help="the same, into a private repository if it is new")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if not (args.model / "config.json").is_file():
        raise ValueError(f"{args.model} is no model folder: it has no config.json")
    push = args.push or args.private
    if push and not args.name:
        raise ValueError("--push and --private need --name, the repository on the hub")
    card = Card(
        license=args.license,
        teacher=args.teacher,
        teacher_license=args.teacher_license,
        datasets=tuple(args.dataset),
        recipe=args.recipe,
        metrics=args.metrics,
    )
    path = write_card(args.model, card, model=args.name or str(args.model))
    print(f"card -> {path}")
    if push:
        weights = ", ".join(f"{part} {size}" for part, size in sizes(ModelFolder.open(args.model)).items())
        print(f"pushing {weights}")
        print(f"pushed -> {upload(args.model, args.name, private=args.private or None)}")
