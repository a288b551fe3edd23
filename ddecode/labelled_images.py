"""A folder of somebody's own images, whatever their format, size and colours.

Its sub-folders are the classes, as torchvision's `ImageFolder` reads it; without any, all images are of one class.

N images, K classes, H W image height and width.
"""

import hashlib
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ddecode.arguments import as_path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SHOWN = 5
"""Files that a refusal names."""
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for files that are no images, are damaged, or unfold beyond all bounds."""


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images on disk with their classes."""

    folder: Path
    paths: tuple[Path, ...]
    """In the order of their classes."""
    counts_K: Tensor
    """int64, images of each class."""
    class_names: tuple[str, ...]
    """Those of the sub-folders; empty where there are none."""

    @classmethod
    def open(cls, folder: str | Path, num_classes: int | None = None) -> "LabelledImages":
        """Sub-folders are the classes 0..K-1 in the order of their names; images may lie at any depth in them.

        Files and folders whose names begin with a dot, and files that are no images by their suffix, are passed over.

        Args:
            folder: the images.
            num_classes: how many classes there have to be; None takes them as they are.

        Raises:
            ValueError: there is no such folder, it has another number of classes, a class has no image, or images lie
                beside the classes.
        """
        folder = as_path("a folder of images", folder)
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if num_classes is not None and max(1, len(classes)) != num_classes:
            raise ValueError(
                f"{folder} holds {len(classes)} folders, but the teacher knows {num_classes} classes, which need one "
                "each"
            )
        loose = sorted(path for path in folder.iterdir() if is_image(path))
        if classes and loose:
            raise ValueError(
                f"{folder} holds both folders, which are classes, and images beside them: " + listed(loose, folder)
            )
        found = [images_below(c) for c in classes] or [loose]
        for label, paths in zip(classes or [folder], found, strict=True):
            if not paths:
                raise ValueError(f"{label} holds no images ({', '.join(SUFFIXES)})")
        return cls(
            folder=folder,
            paths=tuple(path for paths in found for path in paths),
            counts_K=torch.tensor([len(paths) for paths in found]),
            class_names=tuple(path.name for path in classes),
        )

    @property
    def labels_N(self) -> Tensor:
        """int64."""
        return torch.repeat_interleave(torch.arange(len(self.counts_K)), self.counts_K)

    def hash(self) -> str:
        """Tells sets apart by the images' names and sizes on disk, 16 hex digits."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


def is_image(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def images_below(folder: Path) -> list[Path]:
    """At any depth, but for what begins with a dot and what lies in such a folder."""
    found = filter(is_image, folder.rglob("*"))
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def listed(paths: list[Path], folder: Path) -> str:
    """A few of them, for a message."""
    shown = [str(path.relative_to(folder)) for path in sorted(paths)[:SHOWN]]
    return ", ".join(shown + ["..."] * (len(paths) > SHOWN))


def read_pixels(path: Path, size: tuple[int, int]) -> Tensor:
    """uint8 [3,H,W]: turned as its camera says, laid on white where it is transparent, brought to the size by its
    tighter side, the rest cut off evenly.

    Raises:
        ValueError: it is no image, or damaged.
    """
    height, width = size
    try:
        with Image.open(path) as picture:
            # large JPEGs are decoded no finer than they are used
            picture.draft("RGB", (4 * max(size), 4 * max(size)))
            upright = in_colour(ImageOps.exif_transpose(picture))
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    except DAMAGED:
        raise ValueError(f"{path} is no image, or damaged; delete it") from None
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)


def in_colour(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits, whatever the mode."""
    if picture.mode.startswith("I;16") or picture.mode == "I":  # Pillow would clip 16 bits instead of scaling them
        return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layered = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """The same in fp32 and [-1,1]."""
    return read_pixels(path, size) / 127.5 - 1


def read_all(images: LabelledImages, side: int, *, show_progress: bool = True) -> Tensor:
    """All at once: uint8 [N,3,H,W] of H = W = `side`.

    Raises:
        ValueError: some are damaged; it names them.
    """
    damaged: list[Path] = []

    def read(path: Path) -> Tensor:
        try:
            return read_pixels(path, (side, side))
        except ValueError:
            damaged.append(path)
            return torch.zeros(3, side, side, dtype=torch.uint8)

    with ThreadPoolExecutor() as pool:
        read_ahead = pool.map(read, images.paths)
        bar = tqdm(read_ahead, total=len(images.paths), unit="img", desc="images", disable=not show_progress)
        images_N3HW = torch.stack(list(bar))
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(images.paths)} files in {images.folder} are no images, or damaged; delete them: "
            + listed(damaged, images.folder)
        )
    return images_N3HW
