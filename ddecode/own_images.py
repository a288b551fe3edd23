"""One's own images in memory, as training reads them: themselves, and as tokens.

N images, B batch, L token positions, K classes, H W image height and width.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ddecode.files import write_aside
from ddecode.labelled_images import LabelledImages, read_all
from ddecode.randomness import derived_seed

LARGEST_SIDE = 1024
AT_ONCE = 128
"""Images in a network at once where nothing is trained."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How the images are read."""

    side: int = 32
    """Pixels; each image is scaled by its tighter side, and the rest cut off."""
    mirror: bool = True
    """Whether mirror images are as good; not so for letters."""
    held_out: float = 0.05
    """Share of each class that nothing is trained on, to see whether the networks learn the images by heart."""

    def __post_init__(self) -> None:
        if not 4 <= self.side <= LARGEST_SIDE:
            raise ValueError(f"own_teacher.images.side must lie in 4..{LARGEST_SIDE}, got {self.side}")
        if not 0 <= self.held_out <= 0.5:
            raise ValueError(f"own_teacher.images.held_out must lie in [0, 0.5], got {self.held_out}")


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices of `total`, evenly spaced."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


class ImageSamples:
    """`ddecode.training.Samples` of images and labels.

    Args:
        images_N3HW: uint8.
        labels_N: int64.
    """

    def __init__(self, images_N3HW: Tensor, labels_N: Tensor) -> None:
        self.images_N3HW, self.labels_N = images_N3HW, labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """fp32 [B,3,H,W] in [-1,1], and labels."""
        return self.images_N3HW[indices] / 127.5 - 1, self.labels_N[indices]

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """The same of `count` images at most, of all classes."""
        return self.batch(spread(len(self), count))


class TokenSamples:
    """`ddecode.training.Samples` of the tokens of images and their labels; encoded when the first are asked for."""

    def __init__(self, tokenizer: Any, images: ImageSamples, *, mirror: bool, show_progress: bool) -> None:
        self.tokenizer, self.images, self.mirror, self.show_progress = tokenizer, images, mirror, show_progress

    def __len__(self) -> int:
        return len(self.images) * (2 if self.mirror else 1)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.ids_NL[indices], self.images.labels_N[torch.tensor(indices) % len(self.images)]

    @cached_property
    def ids_NL(self) -> Tensor:
        """int64, of the mirror images behind those of the images."""
        device, ids = self.tokenizer.codebook_VC.device, []
        with tqdm(total=len(self), unit="img", desc="tokens", disable=not self.show_progress) as bar:
            for mirrored in (False, True) if self.mirror else (False,):
                for part in torch.arange(len(self.images)).split(AT_ONCE):
                    x = self.images.batch(part.tolist())[0].to(device)
                    ids.append(self.tokenizer.encode(x.flip(-1) if mirrored else x).cpu())
                    bar.update(len(part))
        return torch.cat(ids)


@dataclass(frozen=True, kw_only=True)
class OwnImages:
    """The images of a run, in memory."""

    whole: ImageSamples
    training: ImageSamples
    held_out: ImageSamples
    class_names: tuple[str, ...]
    num_classes: int
    hash: str

    @classmethod
    def read(cls, folder: Path, config: ImagesConfig, kept: Path, *, show_progress: bool = True) -> "OwnImages":
        """
        Args:
            folder: see `ddecode.labelled_images`.
            config: their size.
            kept: a folder where the scaled images are kept for the next time.

        Raises:
            ValueError: it holds no images, damaged ones, or fewer than two.
        """
        found = LabelledImages.open(folder)
        if len(found.paths) < 2:
            raise ValueError(f"{folder} holds one image; a teacher needs more, best thousands")
        path, images_N3HW = kept / f"{found.hash()}-{config.side}.safetensors", None
        if path.exists():
            try:
                images_N3HW = load_file(path)["images"]
            except (SafetensorError, KeyError):
                raise ValueError(f"{path} is damaged; delete it, it will be made again") from None
        if images_N3HW is None:
            images_N3HW = read_all(found, config.side, show_progress=show_progress)
            kept.mkdir(parents=True, exist_ok=True)
            write_aside(path, save({"images": images_N3HW}))
        training, held_out = split(found.counts_K, config.held_out)
        labels_N = found.labels_N
        return cls(
            whole=ImageSamples(images_N3HW, labels_N),
            training=ImageSamples(images_N3HW[training], labels_N[training]),
            held_out=ImageSamples(images_N3HW[held_out], labels_N[held_out]),
            class_names=found.class_names,
            num_classes=len(found.counts_K),
            hash=found.hash(),
        )


FEWEST = 5
"""Images of a class of which one is held out."""


def split(counts_K: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those held out, `share` of each class and of each of `FEWEST` images or
    more at least one, the same every time."""
    training, held_out, begin = [], [], 0
    for label, count in enumerate(counts_K.tolist()):
        order = begin + torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(0, label)))
        kept = max(int(count * share), int(share > 0 and count >= FEWEST))
        held_out.append(order[:kept].sort().values)
        training.append(order[kept:].sort().values)
        begin += count
    return torch.cat(training), torch.cat(held_out)
