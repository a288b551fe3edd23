"""Draw a folder of coloured shapes, one sub-folder for each class: something to try one's own images with.

    .venv/bin/python tools/draw_shapes.py --num 6000 --size 32 --out shapes

Colour, place, size, turn and background are random; image i depends on the seed and i alone.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FINER = 4
"""Shapes are drawn this much larger and scaled down, for smooth edges."""


def polygon(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners on the unit circle; a star where every other one is drawn in to `inner`."""
    count = corners * (2 if inner < 1 else 1)
    radii = [inner if inner < 1 and i % 2 else 1.0 for i in range(count)]
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


OUTLINES = {
    "circle": polygon(48),
    "cross": [(x / 3, y / 3) for x, y in (
        (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)
    )],
    "square": polygon(4),
    "star": polygon(5, 0.45),
    "triangle": polygon(3),
}  # fmt: skip


def draw_shape(outline: list[tuple[float, float]], size: int, rng: np.random.Generator) -> Image.Image:
    """One image: a shape in one colour on two that flow into each other."""
    side = FINER * size
    colours = rng.uniform(0, 255, (3, 3))
    while np.abs(colours[0] - colours[1:]).sum(1).min() < 160:  # the shape has to be seen
        colours = rng.uniform(0, 255, (3, 3))
    share = np.linspace(0, 1, side)[:, None, None]
    background = np.broadcast_to((1 - share) * colours[1] + share * colours[2], (side, side, 3))
    picture = Image.fromarray(background.astype(np.uint8))
    radius = side * rng.uniform(0.22, 0.42)
    x, y = rng.uniform(radius, side - radius, 2)
    turn = rng.uniform(-0.35, 0.35)
    corners = [
        (x + radius * (a * math.cos(turn) - b * math.sin(turn)), y + radius * (a * math.sin(turn) + b * math.cos(turn)))
        for a, b in outline
    ]
    ImageDraw.Draw(picture).polygon(corners, fill=tuple(int(c) for c in colours[0]))
    return picture.resize((size, size), Image.Resampling.BOX)


def draw_folder(out: Path, *, num: int, size: int, seed: int) -> None:
    """`num` images, as many of each class."""
    names = list(OUTLINES)
    for i in range(num):
        name = names[i % len(names)]
        (out / name).mkdir(parents=True, exist_ok=True)
        draw_shape(OUTLINES[name], size, np.random.default_rng([seed, i])).save(out / name / f"{i:06d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=6000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw_folder(args.out, num=args.num, size=args.size, seed=args.seed)


if __name__ == "__main__":
    main()
