"""Train a zoo teacher on the tokens of Fashion-MNIST, originals and mirror images alike.

    .venv/bin/python tools/train_teacher.py --config configs/fashion-llamagen-teacher.yaml \\
        --tokenizer RUN/tokenizer.safetensors --out RUN2

`RUN2/checkpoint/ema.safetensors` is the teacher; `tools/bundle.py` puts it into the zoo. `--resume` goes on.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fashion_mnist import DEFAULT_FOLDER, load_fashion_mnist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ddecode.checkpoint import family_module, save_tensors
from ddecode.config import as_dict, build, read_config
from ddecode.locks import held
from ddecode.objectives.likelihood import LikelihoodObjective
from ddecode.own_images import ImageSamples, TokenSamples
from ddecode.teacher import Recipe
from ddecode.training import train
from ddecode.training_config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A teacher and how it is trained."""

    family: str
    backbone: dict[str, Any]
    training: TrainingConfig
    label_drop: float = 0.1


def read_tokenizer(family: ModuleType, path: Path, backbone: Any) -> Any:
    """A tokenizer as `tools/train_tokenizer.py` writes it; `backbone` are the sizes of the model that reads it."""
    state = load_file(path)
    known = {name: getattr(backbone, name) for name in family.TOKENIZER_SIZES}
    return family.build_tokenizer(family.tokenizer_config(state, **known), state)


def read_samples(tokenizer: Any, args: argparse.Namespace) -> TokenSamples:
    images_N1HW, labels_N = load_fashion_mnist("train", args.data)
    images = ImageSamples(images_N1HW.expand(-1, 3, -1, -1), labels_N)
    samples = TokenSamples(tokenizer, images, mirror=True, show_progress=True)
    if args.tokens and args.tokens.exists():
        samples.ids_NL = load_file(args.tokens)["ids"].long()
    elif args.tokens:
        args.tokens.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(args.tokens, {"ids": samples.ids_NL.to(torch.int16)})
    return samples


@torch.no_grad()
def begin_from(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights. VAR's modulation maps, where every block has its own and `backbone` shares one, become their mean,
    and what a block's says beside it on the average of the classes becomes that block's constant."""
    if "shared_ada_lin.1.weight" in backbone.state_dict() and "shared_ada_lin.1.weight" not in state:
        maps = [n.removesuffix(".weight") for n in state if n.endswith(".ada_lin.1.weight") and n.startswith("blocks.")]
        shared = torch.stack([state[f"{name}.weight"] for name in maps]).mean(0)
        class_D = functional.silu(state["class_emb.weight"]).mean(0)
        for name in maps:
            weight, bias = state.pop(f"{name}.weight"), state.pop(f"{name}.bias")
            constant = bias + (weight - shared) @ class_D
            state[name.replace("ada_lin.1", "ada_gss")] = constant.view(1, 1, 6, -1)
        state |= {"shared_ada_lin.1.weight": shared, "shared_ada_lin.1.bias": torch.zeros(len(shared))}
    backbone.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--init", type=Path, help="begin from these weights")
    parser.add_argument("--tokens", type=Path, help="the training set's tokens: read, or written the first time")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args()

    config = read_config(args.config, TeacherConfig, args.overrides)
    torch.manual_seed(config.training.seed)
    family = family_module(config.family)
    sizes = build(family.BackboneConfig, config.backbone, "backbone")
    tokenizer = read_tokenizer(family, args.tokenizer, sizes)
    teacher = family.build_teacher(sizes, tokenizer, None, Recipe())
    if args.init:
        begin_from(teacher.backbone, load_file(args.init))
    objective = LikelihoodObjective(teacher, label_drop=config.label_drop)
    samples = read_samples(tokenizer, args)
    with held(args.out):
        train(objective, samples, config.training, args.out, identity=as_dict(config), resume=args.resume)


if __name__ == "__main__":
    main()
