"""Real images as positives of the adversarial term: encoded once, then drawn by class.

They take part as tokens. Decoded, they come with the same faults of the tokenizer as the student's images, so a
discriminator has to tell what is in a picture; beside the pixels themselves it would learn to tell decoded pictures
from others, in which the student cannot follow.

N images, B batch, L token positions, K classes, H W image height and width.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ddecode.files import write_aside
from ddecode.images import opened_image
from ddecode.teacher import Teacher

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SHARD_SIZE = 4096
BATCH = 32
"""Images in the encoder at once."""


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """A folder of images in one sub-folder for each class, as torchvision's `ImageFolder` reads it."""

    folder: Path
    paths: tuple[Path, ...]
    """In the order of their classes."""
    counts_K: Tensor
    """int64, images of each class."""

    @classmethod
    def open(cls, folder: Path, num_classes: int) -> "LabelledImages":
        """Sub-folders are the classes 0..K-1 in the order of their names; images may lie at any depth in them.

        Raises:
            ValueError: there is no such folder, it has another number of classes, or a class has no image.
        """
        if not folder.is_dir():
            raise ValueError(f"objective.adversarial.images: there is no folder {folder}")
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if len(classes) != num_classes:
            raise ValueError(
                f"objective.adversarial.images: {folder} holds {len(classes)} folders, but the teacher knows "
                f"{num_classes} classes, which need one each"
            )
        found = [sorted(path for path in c.rglob("*") if path.suffix.lower() in SUFFIXES) for c in classes]
        for label, paths in zip(classes, found, strict=True):
            if not paths:
                raise ValueError(f"objective.adversarial.images: {label} holds no images ({', '.join(SUFFIXES)})")
        counts_K = torch.tensor([len(paths) for paths in found])
        return cls(folder=folder, paths=tuple(path for paths in found for path in paths), counts_K=counts_K)

    def hash(self) -> str:
        """Tells sets apart by the images' names and sizes on disk, 16 hex digits."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


class Positives:
    """Tokens of real images, drawn by class.

    Args:
        ids_NL: in the order of their classes.
        counts_K: int64, images of each class, at least 1.
    """

    def __init__(self, ids_NL: Tensor, counts_K: Tensor) -> None:
        self.ids_NL, self.counts_K = ids_NL, counts_K
        self.begins_K = counts_K.cumsum(0) - counts_K

    def draw(self, labels_B: Tensor, generator: torch.Generator) -> Tensor:
        """ids int64 [B,L] of images of these classes, on the labels' device; `generator` is one of the CPU."""
        labels_cpu_B = labels_B.cpu()
        share_B = torch.rand(len(labels_B), generator=generator, dtype=torch.float64)
        index_B = self.begins_K[labels_cpu_B] + (share_B * self.counts_K[labels_cpu_B]).long()
        return self.ids_NL[index_B].long().to(labels_B.device)


def encode_images(
    images: LabelledImages, teacher: Teacher, folder: Path, *, rank: int = 0, world: int = 1, show_progress: bool = True
) -> None:
    """Write the images' tokens as shards, those that are not there yet; process `rank` of `world` every world-th.

    Raises:
        ValueError: the teacher's tokenizer cannot encode, or an image is damaged.
    """
    if not callable(getattr(teacher.tokenizer, "encode", None)):
        raise ValueError("objective.adversarial.images: the teacher's tokenizer has no encoder; leave the images out")
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(zip(shard_paths(images, folder), batched(images.paths, SHARD_SIZE), strict=True))
    todo = [(shard, paths) for shard, paths in shards[rank::world] if not shard.exists()]
    size = image_size(teacher)
    dtype = torch.int16 if len(teacher.codebook_VC) <= 2**15 else torch.int32
    total = sum(len(paths) for _, paths in todo)
    bar = tqdm(total=total, unit="img", desc="images", disable=not (show_progress and rank == 0))
    with bar, ThreadPoolExecutor() as pool:
        for shard, paths in todo:
            parts = []
            for some in batched(paths, BATCH):
                batch = list(pool.map(partial(read_image, size=size), some))
                parts.append(teacher.tokenizer.encode(torch.stack(batch).to(teacher.device)).to(dtype).cpu())
                bar.update(len(batch))
            write_aside(shard, save({"ids": torch.cat(parts)}))


def read_positives(images: LabelledImages, folder: Path) -> Positives:
    """
    Raises:
        ValueError: a shard is damaged.
    """
    parts = []
    for path in shard_paths(images, folder):
        try:
            parts.append(load_file(path)["ids"])
        except (SafetensorError, KeyError):
            raise ValueError(f"{path} is damaged; delete it, it will be made again") from None
    return Positives(torch.cat(parts), images.counts_K)


def batched(paths: tuple[Path, ...], size: int) -> list[tuple[Path, ...]]:
    return [paths[first : first + size] for first in range(0, len(paths), size)]


def shard_paths(images: LabelledImages, folder: Path) -> list[Path]:
    return [folder / f"{shard:05d}.safetensors" for shard, _ in enumerate(batched(images.paths, SHARD_SIZE))]


@torch.no_grad()
def image_size(teacher: Teacher) -> tuple[int, int]:
    """Height and width of what the tokenizer decodes a sequence to."""
    ids_BL = torch.zeros(1, teacher.length, dtype=torch.int64, device=teacher.device)
    *_, height, width = teacher.tokenizer.decode(ids_BL).shape
    return height, width


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """fp32 [3,H,W] in [-1,1]: brought to the size by its tighter side, the rest cut off evenly.

    Raises:
        ValueError: it is no image, or damaged.
    """
    height, width = size
    with opened_image(path) as picture:
        fitted = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1) / 127.5 - 1
