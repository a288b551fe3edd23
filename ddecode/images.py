"""Images on disk: grids, folders, arrays.

N images, H W height and width; everything uint8 [N,H,W,3].
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ddecode.files import write_aside


def grid(images_NHW3: np.ndarray, columns: int | None = None, scale: int = 1) -> Image.Image:
    """Images side by side, row by row; enlarged `scale` times without smoothing."""
    count, height, width, _ = images_NHW3.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
    for i, image in enumerate(images_NHW3):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def check_out(out: Path) -> None:
    """Refuse a path that `save_images` cannot write.

    Raises:
        ValueError: its suffix is neither .png, .npz nor absent, or a file is in the way.
    """
    if out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"--out {out}: expected .png (a grid), .npz (arrays) or no suffix (a folder of PNGs)")
    if out.suffix == "" and out.is_file():
        raise ValueError(f"--out {out} is a file; without a suffix it must be a folder")
    if out.suffix and out.is_dir():
        raise ValueError(f"--out {out} is a folder; leave the suffix out to write one PNG each")
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out}: cannot write in {existing}")


def save_images(images_NHW3: np.ndarray, labels_N: np.ndarray, out: Path) -> None:
    """`.png` a grid, `.npz` the arrays `arr_0` and `labels`, no suffix a folder with one PNG each."""
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        write_aside(out, png(grid(images_NHW3, scale=max(1, 96 // images_NHW3.shape[1]))))
    elif out.suffix == ".npz":
        stream = io.BytesIO()
        np.savez(stream, arr_0=images_NHW3, labels=labels_N)
        write_aside(out, stream.getvalue())
    else:
        out.mkdir(exist_ok=True)
        for i, (image, label) in enumerate(zip(images_NHW3, labels_N, strict=True)):
            write_aside(out / f"{i:06d}-class{label}.png", png(Image.fromarray(image)))
