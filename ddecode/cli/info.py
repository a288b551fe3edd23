"""`ddecode info`: what a model is."""

import argparse
import json
from typing import Any

from ddecode.checkpoint import PARTS, ModelFolder
from ddecode.cli.arguments import add_model


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("info", help="say what a model is: sizes, steps, recipe")
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    folder = ModelFolder.open(args.model)
    facts: dict[str, Any] = {"model": folder.path.name, "family": folder.config["family"]}
    for part in PARTS:
        if folder.has(part):
            state = folder.state(part)
            facts[part] = {"parameters": sum(t.numel() for t in state.values()), **folder.config[part]}
    if folder.has("teacher"):
        teacher = folder.teacher()
        facts["teacher"]["steps"] = len(teacher.steps)
        facts["tokens"], facts["codes"] = teacher.length, len(teacher.codebook_VC)
        facts["num_classes"] = teacher.num_classes
        facts["teacher_hash"] = folder.teacher_hash()
    if folder.has("class_names"):
        facts["class_names"] = folder.config["class_names"]
    if args.json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                print(f"  {name}: {entry:,}" if name == "parameters" else f"  {name}: {entry}")
        else:
            print(f"{key}: {value}")
