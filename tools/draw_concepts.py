"""Draw the guide's picture: from noise to an image, by the teacher token by token and by the student at once.

    .venv/bin/python tools/draw_concepts.py --out docs/concepts.png

Noise and tokens are shown as colours: the first three numbers of each position's vector.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ddecode import DistilledPipeline
from ddecode.config import as_dict
from ddecode.files import write_aside
from ddecode.images import png, to_uint8
from ddecode.trajectory import resolve

PANEL, GAP, LEFT, TOP, ROW = 128, 44, 96, 26, 186
SHOWN = (1, 16, 40)
"""Numbers of resolved tokens at which the teacher is shown."""


def colours(vectors_LC: Tensor, spread: float) -> Image.Image:
    """A square grid of positions; vectors of `spread` are at full colour."""
    side = round(len(vectors_LC) ** 0.5)
    pixels = ((vectors_LC[:, :3] / spread).clamp(-1, 1) + 1) * 127.5
    picture = Image.fromarray(pixels.view(side, side, 3).to(torch.uint8).numpy())
    return picture.resize((PANEL, PANEL), Image.Resampling.NEAREST)


def enlarged(image_HW3: np.ndarray) -> Image.Image:
    return Image.fromarray(image_HW3).resize((PANEL, PANEL), Image.Resampling.NEAREST)


class Canvas:
    """Panels in rows, with captions below and arrows between them."""

    def __init__(self, columns: int, rows: int) -> None:
        self.picture = Image.new("RGB", (LEFT + columns * (PANEL + GAP) - GAP + 8, TOP + rows * ROW), "white")
        self.pen = ImageDraw.Draw(self.picture)

    def panel(self, column: int, row: int, picture: Image.Image, caption: str) -> None:
        x, y = LEFT + column * (PANEL + GAP), TOP + row * ROW
        self.picture.paste(picture, (x, y))
        self.pen.rectangle((x - 1, y - 1, x + PANEL, y + PANEL), outline="black")
        self.pen.text((x + PANEL // 2, y + PANEL + 8), caption, "black", anchor="ma", font_size=14)

    def arrow(self, after: int, before: int, row: int, caption: str = "") -> None:
        begin, end = LEFT + after * (PANEL + GAP) + PANEL + 6, LEFT + before * (PANEL + GAP) - 6
        y = TOP + row * ROW + PANEL // 2
        self.pen.line((begin, y, end, y), fill="black", width=2)
        self.pen.polygon(((end, y), (end - 8, y - 5), (end - 8, y + 5)), fill="black")
        self.pen.text(((begin + end) // 2, y - 24), caption, "black", anchor="ma", font_size=14)

    def name(self, row: int, text: str) -> None:
        self.pen.multiline_text((6, TOP + row * ROW + PANEL // 2 - 18), text, "black", font_size=17)


@torch.no_grad()
def draw(pipe: DistilledPipeline, label: int, seed: int) -> Image.Image:
    teacher = pipe.teacher
    assert teacher is not None and pipe.student is not None
    codes_VC, length = teacher.codebook_VC, pipe.length
    noise_LC = torch.randn(length, codes_VC.shape[1], generator=torch.Generator().manual_seed(seed))
    ids_L = resolve(teacher, noise_LC[None], [label], **as_dict(teacher.recipe))[0]
    student_LC = pipe([label], generator=torch.Generator().manual_seed(seed), output_type="latent").images[0]
    spread = float(codes_VC.abs().mean()) * 2

    canvas, last = Canvas(len(SHOWN) + 3, 2), len(SHOWN) + 1
    canvas.name(0, "teacher")
    canvas.panel(0, 0, colours(noise_LC, 2.5), f"noise, {length} positions")
    for column, done in enumerate(SHOWN, start=1):
        partly = torch.where(torch.arange(length)[:, None] < done, codes_VC[ids_L] / spread, noise_LC / 2.5)
        canvas.panel(column, 0, colours(partly, 1.0), f"after {done} pass{'es' * (done > 1)}")
        canvas.arrow(column - 1, column, 0)
    canvas.panel(last, 0, colours(codes_VC[ids_L], spread), f"after {length}: tokens")
    canvas.arrow(last - 1, last, 0)
    canvas.panel(last + 1, 0, enlarged(to_uint8(teacher.tokenizer.decode(ids_L[None]))[0]), "decoded")
    canvas.arrow(last, last + 1, 0)
    canvas.name(1, "student")
    canvas.panel(0, 1, colours(noise_LC, 2.5), "the same noise")
    canvas.panel(last, 1, colours(student_LC, spread), "tokens")
    canvas.arrow(0, last, 1, "one pass")
    canvas.panel(last + 1, 1, enlarged(to_uint8(pipe.decode(student_LC[None]))[0]), "decoded")
    canvas.arrow(last, last + 1, 1)
    return canvas.picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fashion-llamagen")
    parser.add_argument("--out", type=Path, default=Path("docs/concepts.png"))
    parser.add_argument("--label", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    picture = draw(DistilledPipeline.from_pretrained(args.model), args.label, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(args.out, png(picture))


if __name__ == "__main__":
    main()
