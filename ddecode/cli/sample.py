"""`ddecode sample`: images from a model."""

import argparse
from collections import deque
from pathlib import Path
from typing import Any

from ddecode.arguments import LARGEST_SEED
from ddecode.cli.arguments import (
    add_device,
    add_model,
    add_with,
    at_least,
    model_name,
    open_pipeline,
    read_classes,
    read_step,
)
from ddecode.images import ImageSet, check_out, write_grid, write_npz
from ddecode.processes import launch, rank
from ddecode.samples import LABELLINGS, draw_all, draw_labels, make_settings, write_folder

OUT_HELP = ".png grid, .npz arrays, or a folder of PNGs: stop that at any moment, and run it again to go on"


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("sample", help="write images", description=__doc__)
    add_model(parser)
    add_with(parser)
    parser.add_argument("--steps", help="student passes, or 'teacher' (default: 1)")
    parser.add_argument("--plan", help="instead of --steps: who:start-stop,...")
    parser.add_argument("--classes", help="comma-separated (default: all)")
    parser.add_argument(
        "--labels",
        choices=LABELLINGS,
        default="balanced",
        help="balanced: image i gets the i-th class, round and round (default); uniform: any, at random",
    )
    parser.add_argument("--num", type=at_least(1), default=16, help="images in all (default: 16)")
    parser.add_argument("--seed", type=at_least(0, LARGEST_SEED), default=0)
    parser.add_argument("--batch", type=at_least(1), default=64, help="images per pass; changes no image")
    add_device(parser)
    parser.add_argument("--out", type=Path, required=True, help=OUT_HELP)
    parser.add_argument("--npz", type=Path, help="with a folder: pack it afterwards for the ADM evaluator")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    launch()
    check_out(args.out)
    if args.npz is not None:
        if args.out.suffix or args.npz.suffix != ".npz":
            raise ValueError("--npz FILE.npz packs a folder: give --out a path without suffix")
        check_out(args.npz)
    pipe = open_pipeline(args).to(args.device)
    plan = pipe.plan(None if args.steps is None else read_step(args.steps), args.plan)
    classes = range(pipe.num_classes) if args.classes is None else read_classes(args.classes, pipe.num_classes)
    labels_N = draw_labels(classes, args.num, labelling=args.labels, seed=args.seed)
    if args.out.suffix:
        images = draw_all(pipe, plan, labels_N, seed=args.seed, batch=args.batch)
        if rank() == 0:
            (write_npz if args.out.suffix == ".npz" else write_grid)(args.out, images, labels_N)
        else:
            deque(images, maxlen=0)  # its share for the first
        made = args.num
    else:
        settings = make_settings(
            pipe,
            plan,
            model=model_name(args.model),
            classes=classes,
            num=args.num,
            labelling=args.labels,
            seed=args.seed,
        )
        made = write_folder(pipe, plan, settings, args.out, batch=args.batch)
    if rank() > 0:
        return
    if args.npz is not None:
        write_npz(args.npz, ImageSet.open(args.out).batches(args.num, args.batch), labels_N)
    print(f"{args.num} images by {plan} -> {args.out}" + (f" ({made} made now)" if made < args.num else ""))
