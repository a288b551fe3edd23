"""Images from a decoder to 8 bits and on disk: grids, folders of PNGs, arrays; sets are written and read by batches.

N images of a set, B of a batch, H W image height and width; images are uint8 [B,H,W,3], a decoder's [B,3,H,W].
"""

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ddecode.arguments import as_path, check_images, check_pictures, check_whole
from ddecode.files import check_room, opened_aside, write_aside

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ROUNDING = "clamp to [-1,1], round((x+1)*127.5) to 8 bits"
"""What `to_uint8` does, as torchvision's `save_image`, DD1 and LlamaGen do: nearest. guided-diffusion truncates."""
NAME = re.compile(r"(?P<index>\d{6,})-class(?P<label>\d+)\.png")
"""Of image `index` of a set in a folder; see `image_name`."""
LARGEST_IMAGE = 1 << 28
"""Bytes of one image of an `.npz`; more are not read at once."""
LARGEST_GRID = 1 << 12
"""Columns of a grid, and pixels that one becomes on either side."""
LARGEST_HEADER = 1 << 16
"""Of an `.npy`."""
NOTE = "ddecode"
"""The PNG text chunk of `png`'s note."""


def to_output(images_B3HW: Tensor, output_type: OutputType) -> Any:
    """Decoder output in [-1,1] to what the caller asked for; values outside are clamped."""
    if output_type == "pt":
        return (images_B3HW.float().clamp(-1, 1) + 1) / 2
    array = to_uint8(images_B3HW)
    return array if output_type == "np" else [Image.fromarray(image) for image in array]


def to_uint8(images_B3HW: Tensor) -> np.ndarray:
    """Floats [B,3,H,W] in [-1,1] to uint8 [B,H,W,3]: round((x + 1) * 127.5).

    Raises:
        ValueError: they are something else.
    """
    check_images(images_B3HW, 1, finite=False)
    scaled = ((images_B3HW.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


# --- writing --------------------------------------------------------------------------------------------------


def grid(images_NHW3: np.ndarray, columns: int | None = None, scale: int = 1) -> Image.Image:
    """Images side by side, row by row; enlarged `scale` times without smoothing.

    Raises:
        ValueError: they are no uint8 array [N,H,W,3], or a number is out of range.
    """
    check_pictures(images_NHW3)
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None:
            check_whole(name, value, 1, LARGEST_GRID)
    count, height, width, _ = images_NHW3.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
    for i, image in enumerate(images_NHW3):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png(picture: Image.Image, note: Mapping[str, Any] | None = None) -> bytes:
    """A PNG file, with a note that `read_note` finds."""
    stream, texts = io.BytesIO(), PngImagePlugin.PngInfo()
    if note is not None:
        texts.add_text(NOTE, json.dumps(note))
    picture.save(stream, "png", pnginfo=texts)
    return stream.getvalue()


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a PNG file; None if it has none.

    Raises:
        ValueError: it is no image.
    """
    with opened_image(path) as picture:
        try:
            note = json.loads(picture.info[NOTE])
        except (KeyError, ValueError, RecursionError):
            return None
    return note if isinstance(note, dict) else None


def check_png(path: Path) -> None:
    """
    Raises:
        ValueError: its checksums say that it is damaged.
    """
    with opened_image(path) as picture:
        picture.verify()


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, Image.DecompressionBombError):  # a wrong checksum is the second
        raise ValueError(f"{path} is no image, or damaged; delete it") from None


def image_name(index: int, label: int) -> str:
    return f"{index:06d}-class{label}.png"


def check_out(out: Path) -> None:
    """Refuse a path where images cannot be written.

    Raises:
        ValueError: its suffix is neither .png, .npz nor absent, or a file is in the way.
    """
    if out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"--out {out}: expected .png (a grid), .npz (arrays) or no suffix (a folder of PNGs)")
    if out.suffix == "" and out.is_file():
        raise ValueError(f"--out {out} is a file; without a suffix it must be a folder")
    if out.suffix and out.is_dir():
        raise ValueError(f"--out {out} is a folder; leave the suffix out to write one PNG each")
    check_room(out, "--out")


def write_grid(path: str | Path, images: Iterable[np.ndarray], labels_N: np.ndarray) -> None:
    """One PNG of all images, small ones enlarged; labels do not show."""
    path = as_path("the picture", path)
    images_NHW3 = np.concatenate(list(images))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, png(grid(images_NHW3, scale=max(1, 96 // images_NHW3.shape[1]))))


def write_npz(path: str | Path, images: Iterable[np.ndarray], labels_N: np.ndarray) -> None:
    """The arrays that guided-diffusion's sampler writes and its evaluator reads.

    Args:
        path: its folder is made if missing.
        images: batches, uint8 [B,H,W,3]; together `arr_0`, uint8 [N,H,W,3].
        labels_N: int64; `arr_1`, as upstream, and once more under the name `labels`.

    Raises:
        ValueError: the images are of another kind or size, or not as many as the labels.
    """
    path, written = as_path("the arrays", path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened_aside(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            for images_BHW3 in images:
                check_pictures(images_BHW3)
                if not written:
                    shape = (len(labels_N), *images_BHW3.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(entry, header)
                if images_BHW3.shape[1:] != shape[1:]:
                    raise ValueError(f"images must be of one size, got {images_BHW3.shape[1:3]} after {shape[1:3]}")
                entry.write(images_BHW3.tobytes())
                written += len(images_BHW3)
            if written != len(labels_N):
                raise ValueError(f"{len(labels_N)} labels for {written} images")
        for name in ("arr_1", "labels"):
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(labels_N, np.int64))


# --- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A folder of PNGs, in the order of their names, or an `.npz`."""

    path: Path
    num: int
    labels_N: np.ndarray | None
    """int64, where names or arrays tell them."""
    note: dict[str, Any] | None
    """What `ddecode sample` says of them."""

    @classmethod
    def open(cls, path: str | Path) -> "ImageSet":
        """
        Raises:
            ValueError: there are no images, or they are damaged or incomplete.
        """
        path = as_path("a set of images", path)
        if path.suffix == ".npz":
            with opened_array(path) as (_, shape):
                return cls(path=path, num=shape[0], labels_N=npz_labels(path, shape[0]), note=None)
        names = [file.name for file in pngs(path)]
        if not names:
            raise ValueError(f"{path} holds no images: expected an .npz with arr_0, or a folder of PNGs")
        known = [match for name in names if (match := NAME.fullmatch(name))]
        note = read_note(path / names[0]) if len(known) == len(names) else None
        if note is not None and int(known[-1]["index"]) != len(names) - 1:
            raise ValueError(f"{path} lacks images before {names[-1]}: run the ddecode sample that made them again")
        labels_N = np.array([int(match["label"]) for match in known]) if len(known) == len(names) else None
        return cls(path=path, num=len(names), labels_N=labels_N, note=note)

    def batches(self, num: int, batch: int) -> Iterator[np.ndarray]:
        """The first `num` images, uint8 [B,H,W,3].

        Raises:
            ValueError: one is damaged, or not of the others' size.
        """
        if self.path.suffix == ".npz":
            return array_batches(self.path, num, batch)
        return png_batches(pngs(self.path)[:num], batch)


def is_image_set(path: Path) -> bool:
    """Whether a path is an `.npz`, or a folder of PNGs and no model."""
    if path.is_dir():
        return not (path / "config.json").exists() and bool(pngs(path))
    return path.suffix == ".npz"


def pngs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def png_batches(paths: list[Path], batch: int) -> Iterator[np.ndarray]:
    shape = None
    for first in range(0, len(paths), batch):
        images = []
        for path in paths[first : first + batch]:
            with opened_image(path) as picture:
                images.append(np.asarray(picture.convert("RGB")))
            shape = shape or images[0].shape
            if images[-1].shape != shape:
                raise ValueError(f"{path} is {images[-1].shape[:2]} pixels large, those before it {shape[:2]}")
        yield np.stack(images)


@contextmanager
def opened_array(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The bytes of an `.npz`'s `arr_0`, and its shape [N,H,W,3].

    Raises:
        ValueError: there is no such file, it is damaged or holds other arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
            shape, is_fortran, dtype = read_header(entry, path)
            if is_fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
                raise ValueError(f"arr_0 of {path} must be uint8 [N,H,W,3], got {dtype} {list(shape)}")
            if math.prod(shape[1:]) > LARGEST_IMAGE:
                raise ValueError(f"images of {path} are said to be {shape[1]} x {shape[2]} pixels large")
            yield entry, shape
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except KeyError:
        raise ValueError(f"{path} holds no images: it lacks arr_0") from None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise ValueError(f"{path} is damaged") from None


def read_header(entry: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether columns come first, and dtype of an `.npy`.

    Raises:
        ValueError: it is none.
    """
    try:
        version = np.lib.format.read_magic(entry)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(entry)
    except ValueError:
        raise ValueError(f"{path} is damaged: arr_0 is no array") from None


def array_batches(path: Path, num: int, batch: int) -> Iterator[np.ndarray]:
    with opened_array(path) as (entry, (total, *size)):
        for first in range(0, min(num, total), batch):
            shape = (min(batch, num - first, total - first), *size)
            data = bytearray(entry.read(math.prod(shape)))  # which torch, unlike bytes, may share
            if len(data) < math.prod(shape):
                raise EOFError
            yield np.frombuffer(data, np.uint8).reshape(shape)


def npz_labels(path: Path, num: int) -> np.ndarray | None:
    """int64 [N], where there are any.

    Raises:
        ValueError: they are of another number, or damaged.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {part.filename: part.file_size for part in archive.infolist()}
    name = next((name for name in ("labels", "arr_1") if f"{name}.npy" in sizes), None)
    if name is None:
        return None
    try:
        if sizes[f"{name}.npy"] <= 8 * num + LARGEST_HEADER:
            with np.load(path) as arrays:
                labels_N = arrays[name]
            if labels_N.size == num and np.issubdtype(labels_N.dtype, np.integer):
                return labels_N.astype(np.int64).ravel()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError):
        pass
    raise ValueError(f"{name} of {path} must be {num} whole numbers, or is damaged")
