"""`ddecode sample`: images from a model."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddecode.cli.arguments import add_model, add_with, at_least, open_pipeline, read_classes, read_step
from ddecode.images import check_out, save_images
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan
from ddecode.randomness import sample_generators


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("sample", help="write images", description=__doc__)
    add_model(parser)
    add_with(parser)
    parser.add_argument("--steps", help="student passes, or 'teacher' (default: 1)")
    parser.add_argument("--plan", help="instead of --steps: who:start-stop,...")
    parser.add_argument("--classes", help="comma-separated; sample i gets the i-th, round and round (default: all)")
    parser.add_argument("--num", type=at_least(1), default=16, help="images in all (default: 16)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--batch", type=at_least(1), default=64, help="images per pass; changes no image")
    parser.add_argument("--out", type=Path, required=True, help=".png grid, .npz arrays, or a folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_out(args.out)
    pipe = open_pipeline(args)
    plan = pipe.plan(None if args.steps is None else read_step(args.steps), args.plan)
    classes = (
        read_classes(args.classes, pipe.num_classes) if args.classes is not None else list(range(pipe.num_classes))
    )
    labels = [classes[i % len(classes)] for i in range(args.num)]
    images = sample_images(pipe, plan, labels, seed=args.seed, batch=args.batch)
    save_images(images, np.array(labels), args.out)
    print(f"{args.num} images by {plan} -> {args.out}")


def sample_images(
    pipe: DistilledPipeline, plan: Plan, labels: list[int], *, seed: int, batch: int, show_progress: bool = True
) -> np.ndarray:
    """uint8 [N,H,W,3]; image i depends on (seed, i) and its label alone."""
    images = []
    with tqdm(total=len(labels), unit="img", disable=not show_progress, leave=False) as bar:
        for first in range(0, len(labels), batch):
            part = range(first, min(first + batch, len(labels)))
            generators = sample_generators(seed, part)
            output = pipe([labels[i] for i in part], plan=plan, generator=generators, output_type="np")
            images.append(output.images)
            bar.update(len(part))
    return np.concatenate(images)
