"""Fashion-MNIST (60 000 + 10 000 real images, MIT licence) as the zoo uses it.

The idx files come from Debian's `dataset-fashion-mnist` package or from any folder that holds the four
`*-ubyte.gz` files. Images are padded from 28x28 to 32x32 and repeated over three equal channels.
"""

import gzip
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes."""
    with gzip.open(path, "rb") as stream:
        data = stream.read()
    n_dim = data[3]
    shape = struct.unpack(f">{n_dim}I", data[4 : 4 + 4 * n_dim])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * n_dim).reshape(shape)


def load_fashion_mnist(split: Literal["train", "test"], folder: Path = DEFAULT_FOLDER) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 32, 32] (0 is background) and labels int64 [N].

    Raises:
        ValueError: the folder lacks the idx files.
    """
    stem = {"train": "train", "test": "t10k"}[split]
    images_path = folder / f"{stem}-images-idx3-ubyte.gz"
    labels_path = folder / f"{stem}-labels-idx1-ubyte.gz"
    if not images_path.exists() or not labels_path.exists():
        raise ValueError(f"no Fashion-MNIST in {folder}: install Debian's dataset-fashion-mnist or pass --data FOLDER")
    images = torch.from_numpy(read_idx(images_path).copy())
    padded_B1HW = torch.nn.functional.pad(images[:, None], (2, 2, 2, 2))
    return padded_B1HW, torch.from_numpy(read_idx(labels_path).astype(np.int64))


def to_model_range(images_B1HW: Tensor, flip_B: Tensor | None = None) -> Tensor:
    """uint8 [B,1,H,W] to fp32 [B,3,H,W] in [-1, 1], mirrored where `flip_B` (bool) says so."""
    x = images_B1HW.float() / 127.5 - 1.0
    if flip_B is not None:
        x = torch.where(flip_B[:, None, None, None], x.flip(-1), x)
    return x.expand(-1, 3, -1, -1)
