"""Put a trained tokenizer, teacher and student into the zoo, in half precision.

    .venv/bin/python tools/bundle.py --name fashion-llamagen --tokenizer RUN/tokenizer.safetensors \\
        --teacher-config configs/fashion-llamagen-teacher.yaml --teacher RUN2/checkpoint/ema.safetensors \\
        --guidance-scale 1.5
    .venv/bin/python tools/bundle.py --name fashion-llamagen --student RUN3/model
    .venv/bin/python tools/bundle.py --name fashion-llamagen --other small=fashion-llamagen-small
    .venv/bin/python tools/bundle.py --name fashion-var-light --student RUN4/model --of fashion-var

First the teacher, since its pairs are made with the rounded weights; then its student; a small teacher, bundled like
the large one under its own name, becomes one that stitched plans may call; a further student of a bundled teacher gets
a folder of its own without the teacher. The recipe `configs/NAME.yaml` is copied
beside the weights, for the demo.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import CLASS_NAMES
from safetensors.torch import load_file
from train_teacher import TeacherConfig, read_tokenizer

from ddecode.checkpoint import ModelFolder, family_module, save_model
from ddecode.config import as_dict, build, read_config
from ddecode.files import write_aside
from ddecode.teacher import Recipe

ZOO = Path(__file__).parent.parent / "ddecode" / "zoo"


def bundle_teacher(args: argparse.Namespace, folder: Path) -> None:
    config = read_config(args.teacher_config, TeacherConfig)
    family = family_module(config.family)
    sizes = build(family.BackboneConfig, config.backbone, "backbone")
    tokenizer = read_tokenizer(family, args.tokenizer, sizes)
    backbone = family.build_backbone(sizes, tokenizer, load_file(args.teacher))
    recipe = Recipe(guidance_scale=args.guidance_scale, top_k=args.top_k, top_p=args.top_p)
    description = {
        "family": config.family,
        "tokenizer": as_dict(tokenizer.config),
        "teacher": {"backbone": as_dict(backbone.config), "recipe": as_dict(recipe)},
        "class_names": CLASS_NAMES,
        "features": "fashion-eval",
    }
    save_model(folder, description, {"tokenizer": tokenizer, "teacher": backbone}, dtype=torch.float16)


def bundle_student(args: argparse.Namespace, folder: Path) -> None:
    zoo, run = ModelFolder.open(ZOO / args.of if args.of else folder), ModelFolder.open(args.student)
    if run.teacher_hash() != zoo.teacher_hash():
        raise SystemExit(f"{args.student} was distilled from another teacher than the one in {zoo.path}")
    parts: dict[str, Any] = {
        "tokenizer": zoo.tokenizer(), "teacher": zoo.teacher().backbone, "student": run.student(),
    }  # fmt: skip
    description = without_format(zoo) | {"student": run.config["student"]}
    if args.of:
        description = {key: value for key, value in description.items() if key not in ("teacher", "others")}
        del parts["teacher"]
    save_model(folder, description, parts, dtype=torch.float16)
    shutil.copy(ZOO.parent.parent / "configs" / f"{args.name}.yaml", folder / "recipe.yaml")


def name_other(args: argparse.Namespace, folder: Path) -> None:
    """Only the config changes, not the weights."""
    zoo = ModelFolder.open(folder)
    name, _, model = args.other.partition("=")
    ModelFolder.open(model).require("teacher")
    config = dict(zoo.config) | {"others": zoo.config.get("others", {}) | {name: model}}
    write_aside(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def without_format(model: ModelFolder) -> dict[str, Any]:
    return {key: value for key, value in model.config.items() if key != "format"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--teacher-config", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--other", metavar="NAME=MODEL", help="let plans call MODEL's teacher NAME")
    parser.add_argument("--guidance-scale", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--student", type=Path, help="a model folder made by ddecode distill")
    parser.add_argument("--of", metavar="NAME", help="the bundled model whose teacher a further student has")
    args = parser.parse_args()
    folder = ZOO / args.name
    if args.student:
        bundle_student(args, folder)
    elif args.other:
        name_other(args, folder)
    else:
        bundle_teacher(args, folder)
    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"{folder.name}: {size:.1f} MB; {json.dumps(ModelFolder.open(folder).config)[:200]} ...")


if __name__ == "__main__":
    main()
