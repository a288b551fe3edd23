"""Put a trained tokenizer, teacher and student into the zoo, in half precision.

    .venv/bin/python tools/bundle.py --name fashion-llamagen --tokenizer RUN/tokenizer.safetensors \\
        --teacher-config configs/fashion-llamagen-teacher.yaml --teacher RUN2/checkpoint/ema.safetensors \\
        --guidance-scale 1.5
    .venv/bin/python tools/bundle.py --name fashion-llamagen --student RUN3/model

First the teacher, since its pairs are made with the rounded weights; then its student. The recipe
`configs/NAME.yaml` is copied beside the weights, for the demo.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from fashion_mnist import CLASS_NAMES
from safetensors.torch import load_file
from train_teacher import TeacherConfig

from ddecode.checkpoint import ModelFolder, save_model
from ddecode.config import as_dict, read_config
from ddecode.teacher import Recipe
from third_party_loaders.llamagen import build_backbone, load_tokenizer
from third_party_loaders.llamagen_transformer import TransformerConfig

ZOO = Path(__file__).parent.parent / "ddecode" / "zoo"


def bundle_teacher(args: argparse.Namespace, folder: Path) -> None:
    config = read_config(args.teacher_config, TeacherConfig)
    tokenizer = load_tokenizer(args.tokenizer)
    backbone = build_backbone(TransformerConfig(**config.backbone), load_file(args.teacher))
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
    model = ModelFolder.open(args.student)
    if model.teacher_hash() != ModelFolder.open(folder).teacher_hash():
        raise SystemExit(f"{args.student} was distilled from another teacher than the one in {folder}")
    student = model.student()
    parts = {"tokenizer": student.tokenizer, "teacher": model.teacher().backbone, "student": student}
    save_model(folder, {k: v for k, v in model.config.items() if k != "format"}, parts, dtype=torch.float16)
    shutil.copy(ZOO.parent.parent / "configs" / f"{args.name}.yaml", folder / "recipe.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--teacher-config", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--guidance-scale", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--student", type=Path, help="a model folder made by ddecode distill")
    args = parser.parse_args()
    folder = ZOO / args.name
    if args.student:
        bundle_student(args, folder)
    else:
        bundle_teacher(args, folder)
    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"{folder.name}: {size:.1f} MB; {json.dumps(ModelFolder.open(folder).config)[:200]} ...")


if __name__ == "__main__":
    main()
