"""`ddecode info`: what a model, or a checkpoint in upstream's layout, is."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ddecode.checkpoint import PARTS, RECIPE, ModelFolder, family_module, loaders
from ddecode.cli.arguments import MODEL_HELP
from ddecode.config import as_dict
from ddecode.conversion import adapter_of, family_of, open_model
from ddecode.yaml_text import parse_yaml


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("info", help="say what a model or a checkpoint is: sizes, steps, recipe")
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or a checkpoint in upstream's layout")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    folder = open_model(args.model)
    facts = upstream_facts(args.model) if folder is None else model_facts(folder)
    if args.json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                print(f"  {name}: {readable(name, entry)}")
        else:
            print(f"{key}: {readable(key, value)}")


def readable(name: str, value: Any) -> str:
    return f"{value:,}" if name == "parameters" else str(value)


def model_facts(folder: ModelFolder) -> dict[str, Any]:
    """About a model in our format."""
    facts: dict[str, Any] = {"model": folder.path.name, "family": folder.config["family"]}
    for part in PARTS:
        if folder.has(part):
            state = folder.state(part)
            numbers = {"parameters": sum(t.numel() for t in state.values()), "dtype": types_of(state.values())}
            facts[part] = {**numbers, **folder.require(part)}
    if folder.has("teacher") and folder.has("tokenizer"):
        teacher = folder.teacher()
        facts["teacher"]["steps"] = len(teacher.steps)
        facts["tokens"], facts["codes"] = teacher.length, len(teacher.codebook_VC)
        facts["num_classes"] = teacher.num_classes
    if folder.has("teacher"):
        facts["teacher_hash"] = folder.teacher_hash()
    for key in ("others", "class_names"):
        if folder.has(key):
            facts[key] = folder.config[key]
    if (recipe := folder.training_recipe()) is not None:
        facts["recipe"] = read_recipe(recipe, folder.path / RECIPE)
    return facts


def read_recipe(text: str, path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no YAML, or no mapping.
    """
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no recipe: it must hold a YAML mapping")
    return tree


def upstream_facts(source: str) -> dict[str, Any]:
    """About a state in upstream's layout; `parameters` leaves out constants and derived buffers."""
    kind, found = loaders().identify(source)
    adapter = adapter_of(kind)
    weights = [tensor for name, tensor in found.tensors.items() if not adapter.is_optional(name)]
    facts: dict[str, Any] = {
        "state": Path(source).name,
        "kind": kind,
        "is": adapter.title,
        "wrapper": found.wrapper or "none",
        "parameters": sum(tensor.numel() for tensor in weights),
        "dtype": types_of(weights),
    }
    try:
        sizes = adapter.config(found.tensors, **adapter.untold(source, {}))
        adapter.own(found.tensors, sizes)
    except ValueError as error:
        return facts | {"problem": str(error)}
    unknown = family_module(family_of(kind)).TOKENIZER_SIZES if adapter.part == "tokenizer" else ()
    return facts | {"sizes": {name: value for name, value in as_dict(sizes).items() if name not in unknown}}


def types_of(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
