"""Fréchet distance of a model's reconstructions of the real test images, and of real training images, to the test
images (the floor): how much of the teacher's distance is the tokenizer's.

    .venv/bin/python tools/measure_tokenizer.py fashion-llamagen

With `--write-statistics FOLDER` it instead writes a feature network's statistics of the real test images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from fashion_mnist import DEFAULT_FOLDER, load_fashion_mnist, to_model_range

from ddecode.checkpoint import ModelFolder, zoo_folder
from ddecode.evaluation.metrics import fit_gaussian, frechet_distance
from ddecode.evaluation.zoo import Judge, write_statistics
from ddecode.images import to_uint8


def as_uint8(images_B1HW: torch.Tensor) -> np.ndarray:
    return images_B1HW.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def measure(model: str, judge: Judge, data: Path) -> None:
    tokenizer = ModelFolder.open(model).tokenizer()
    test, _ = load_fashion_mnist("test", data)
    train, _ = load_fashion_mnist("train", data)
    rebuilt, error, ids = [], [], []
    for chunk in test.split(250):
        x = to_model_range(chunk)
        ids.append(tokenizer.encode(x))
        y = tokenizer.decode(ids[-1])
        error.append((y - x).square().mean().item())
        rebuilt.append(to_uint8(y))
    for name, images in (("reconstructions", np.concatenate(rebuilt)), ("training images", as_uint8(train[:10000]))):
        distance = frechet_distance(fit_gaussian(judge.look(images)[0]), judge.real)
        print(f"{name}: Fréchet distance {distance:.3f} (zoo features {judge.hash}, n 10000)")
    used = len(torch.cat(ids).unique())
    print(f"reconstruction error {np.mean(error):.4f} on [-1,1]; {used} of {len(tokenizer.codebook_VC)} codes used")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fashion-llamagen")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--features", type=Path, default=zoo_folder() / "features" / "fashion-eval")
    parser.add_argument("--write-statistics", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.write_statistics:
        write_statistics(args.write_statistics, as_uint8(load_fashion_mnist("test", args.data)[0]))
    else:
        measure(args.model, Judge.open(args.features), args.data)


if __name__ == "__main__":
    main()
