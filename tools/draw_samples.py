"""Draw the README's picture: for the same noise and labels, the teacher's image through the noise-to-token map in 64
passes, the student's in one and in two.

    .venv/bin/python tools/draw_samples.py fashion-llamagen --out docs/samples.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ddecode import DistilledPipeline
from ddecode.files import write_aside
from ddecode.images import grid, png, to_uint8
from ddecode.randomness import draw_noise, sample_generators
from ddecode.trajectory import resolve

COLUMNS, ROWS, SCALE, MARGIN = 20, 2, 2, 118


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fashion-llamagen")
    parser.add_argument("--out", type=Path, default=Path("docs/samples.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = DistilledPipeline.from_pretrained(args.model)
    teacher = pipe.teacher
    assert teacher is not None
    count = COLUMNS * ROWS
    labels = [i % pipe.num_classes for i in range(count)]

    def generators() -> list[torch.Generator]:
        return sample_generators(args.seed, range(count))

    noise_BLC = draw_noise(generators(), count, (pipe.length, teacher.codebook_VC.shape[1]))
    recipe = teacher.recipe
    ids_BL = resolve(
        teacher, noise_BLC, labels, guidance_scale=recipe.guidance_scale, top_k=recipe.top_k, top_p=recipe.top_p
    )
    strips = {f"teacher\n{len(teacher.steps)} passes": to_uint8(teacher.tokenizer.decode(ids_BL))}
    for steps, name in ((1, "student\n1 pass"), (2, "student\n2 passes")):
        strips[name] = pipe(labels, num_inference_steps=steps, generator=generators(), output_type="np").images
    pictures = {name: grid(np.asarray(images), COLUMNS, SCALE) for name, images in strips.items()}
    height = sum(picture.height + 8 for picture in pictures.values()) - 8
    canvas = Image.new("RGB", (MARGIN + next(iter(pictures.values())).width, height), "white")
    top = 0
    for name, picture in pictures.items():
        canvas.paste(picture, (MARGIN, top))
        ImageDraw.Draw(canvas).multiline_text((4, top + picture.height // 2 - 20), name, "black", font_size=18)
        top += picture.height + 8
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(args.out, png(canvas))


if __name__ == "__main__":
    main()
