"""What the noise-to-token map adds to plain teacher sampling: both in turn, in one run.

    .venv/bin/python tools/measure_pairs.py fashion-llamagen --batch 256 --repeats 7

Prints the medians of `teacher.generate` and `trajectory.resolve` with the teacher's recipe, and the map's share.
"""

import argparse
import statistics
import time

import torch

from ddecode import load_teacher
from ddecode.trajectory import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fashion-llamagen")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--num-steps", type=int, default=16)
    args = parser.parse_args()
    teacher = load_teacher(args.model)
    labels = torch.arange(args.batch) % teacher.num_classes
    noise_BLC = torch.randn(args.batch, teacher.length, teacher.codebook_VC.shape[1])
    recipe = {
        "guidance_scale": teacher.recipe.guidance_scale,
        "top_k": teacher.recipe.top_k,
        "top_p": teacher.recipe.top_p,
    }
    plain, mapped = [], []
    for repeat in range(args.repeats + 1):
        begin = time.perf_counter()
        teacher.generate(labels, **recipe)
        middle = time.perf_counter()
        resolve(teacher, noise_BLC, labels, **recipe, num_steps=args.num_steps)
        end = time.perf_counter()
        if repeat:  # the first is the warm-up
            plain.append(middle - begin)
            mapped.append(end - middle)
    a, b = statistics.median(plain), statistics.median(mapped)
    print(
        f"{args.model}, batch {args.batch}, {args.num_steps} evaluations, {torch.get_num_threads()} threads: "
        f"plain sampling {args.batch / a:.1f} images/s, through the map {args.batch / b:.1f} images/s; "
        f"the map adds {b / a - 1:.1%}"
    )


if __name__ == "__main__":
    main()
