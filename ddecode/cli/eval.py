"""`ddecode eval`: judge a model by a named protocol."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.checkpoint import ModelFolder, zoo_folder
from ddecode.cli.arguments import add_model, add_with, at_least, open_pipeline, read_steps
from ddecode.evaluation.zoo import Judge, as_json, evaluate, table
from ddecode.files import write_aside
from ddecode.plan import Plan


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("eval", help="judge a model by a named protocol", description=__doc__)
    add_model(parser)
    add_with(parser)
    parser.add_argument("--steps", default="teacher,1,2", help="comma-separated (default: teacher,1,2)")
    parser.add_argument("--plan", action="append", default=[], help="a further plan; may be repeated")
    parser.add_argument("--num", type=at_least(1), default=5000, help="samples of each set (default: 5000)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--batch", type=at_least(1), default=250)
    parser.add_argument("--protocol", choices=("zoo",), default="zoo")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    folder = ModelFolder.open(args.model)
    judge = open_judge(folder)
    pipe = open_pipeline(args)
    plans: dict[str, Plan] = {str(steps): pipe.plan(steps) for steps in read_steps(args.steps)}
    plans |= {text: pipe.plan(plan=text) for text in args.plan}
    result = evaluate(pipe, plans, judge, model=folder.path.name, num=args.num, seed=args.seed, batch=args.batch)
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_aside(args.json, (as_json(result) + "\n").encode())


def open_judge(folder: ModelFolder) -> Judge:
    """The feature network that a model's config names.

    Raises:
        ValueError: it names none, or one that is not bundled.
    """
    name = folder.config.get("features")
    if name is None:
        raise ValueError(f"{folder.path.name} names no feature network: protocol zoo judges the bundled data sets only")
    return Judge.open(zoo_folder() / "features" / str(name))
