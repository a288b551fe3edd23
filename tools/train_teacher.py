"""Train a zoo teacher on the tokens of Fashion-MNIST, originals and mirror images alike.

    .venv/bin/python tools/train_teacher.py --config configs/fashion-llamagen-teacher.yaml \\
        --tokenizer RUN/tokenizer.safetensors --out RUN2

`RUN2/checkpoint/ema.safetensors` is the teacher; `tools/bundle.py` puts it into the zoo. `--resume` goes on.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import DEFAULT_FOLDER, load_fashion_mnist, to_model_range
from torch import Tensor

from ddecode.config import TrainingConfig, as_dict, read_config
from ddecode.objectives.likelihood import LikelihoodObjective
from ddecode.teacher import Recipe
from ddecode.training import train
from third_party_loaders.llamagen import build_teacher, load_tokenizer
from third_party_loaders.llamagen_transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A teacher and how it is trained."""

    family: str
    backbone: dict[str, Any]
    training: TrainingConfig
    label_drop: float = 0.1


class ImageTokens:
    """`ddecode.training.Samples` of (ids, label), every image once as it is and once mirrored."""

    def __init__(self, ids_NL: Tensor, labels_N: Tensor) -> None:
        self.ids_NL, self.labels_N = ids_NL, labels_N

    def __len__(self) -> int:
        return len(self.ids_NL)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.ids_NL[indices], self.labels_N[indices]


def encode_training_set(tokenizer: Any, folder: Path) -> ImageTokens:
    images, labels_N = load_fashion_mnist("train", folder)
    ids = []
    for mirrored in (False, True):
        for x in images.split(100):
            ids.append(tokenizer.encode(to_model_range(x, torch.full((len(x),), mirrored))))
    return ImageTokens(torch.cat(ids), labels_N.repeat(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args()

    config = read_config(args.config, TeacherConfig, args.overrides)
    torch.manual_seed(config.training.seed)
    tokenizer = load_tokenizer(args.tokenizer)
    teacher = build_teacher(TransformerConfig(**config.backbone), tokenizer, None, Recipe())
    objective = LikelihoodObjective(teacher, label_drop=config.label_drop)
    samples = encode_training_set(tokenizer, args.data)
    train(objective, samples, config.training, args.out, identity=as_dict(config), resume=args.resume)


if __name__ == "__main__":
    main()
