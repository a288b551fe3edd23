"""Real images as positives of the adversarial term: encoded once, then drawn by class.

They take part as tokens. Decoded, they come with the same faults of the tokenizer as the student's images, so a
discriminator has to tell what is in a picture; beside the pixels themselves it would learn to tell decoded pictures
from others, in which the student cannot follow.

N images, B batch, L token positions, K classes.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ddecode.files import write_aside
from ddecode.labelled_images import LabelledImages, read_image
from ddecode.processes import rank, share
from ddecode.randomness import draw
from ddecode.teacher import Teacher

SHARD_SIZE = 4096
BATCH = 32
"""Images in the encoder at once."""


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
        share_B = draw(partial(torch.rand, dtype=torch.float64), (len(labels_B),), generator)
        index_B = self.begins_K[labels_cpu_B] + (share_B * self.counts_K[labels_cpu_B]).long()
        return self.ids_NL[index_B].long().to(labels_B.device)


def encode_images(images: LabelledImages, teacher: Teacher, folder: Path, *, show_progress: bool = True) -> None:
    """Write the images' tokens as shards, those of this process's share that are not there yet.

    Raises:
        ValueError: the teacher's tokenizer cannot encode, or an image is damaged.
    """
    if not callable(getattr(teacher.tokenizer, "encode", None)):
        raise ValueError("objective.adversarial.images: the teacher's tokenizer has no encoder; leave the images out")
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(zip(shard_paths(images, folder), batched(images.paths, SHARD_SIZE), strict=True))
    todo = [(shard, paths) for shard, paths in share(shards) if not shard.exists()]
    size = image_size(teacher)
    dtype = torch.int16 if len(teacher.codebook_VC) <= 2**15 else torch.int32
    total = sum(len(paths) for _, paths in todo)
    bar = tqdm(total=total, unit="img", desc="images", disable=not (show_progress and rank() == 0))
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
    for path, paths in zip(shard_paths(images, folder), batched(images.paths, SHARD_SIZE), strict=True):
        try:
            ids_NL = load_file(path)["ids"]
        except (SafetensorError, KeyError):
            ids_NL = torch.empty(0)
        if ids_NL.dim() != 2 or len(ids_NL) != len(paths):
            raise ValueError(f"{path} is damaged; delete it, it will be made again")
        parts.append(ids_NL)
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
