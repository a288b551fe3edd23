"""`ddecode convert`: upstream's checkpoints to our directory format and back, bit for bit."""

import argparse
from pathlib import Path
from typing import Any

from ddecode.arguments import shown
from ddecode.cli.arguments import at_least
from ddecode.conversion import KINDS, Options, convert

DESCRIPTION = """\
A checkpoint in upstream's layout becomes a model folder; a model folder becomes model.safetensors and
tokenizer.safetensors in upstream's layout, the same bits that came in. What STATE is gets judged first."""
EPILOG = """\
Students start, and go over from tokens to vectors, where the published ones of their size do: VAR d16 at 55 tokens,
d20 and d24 at 30, which d30 follows; LlamaGen starts at 80, and goes over at 80 (B) or 130 (L, which larger ones
follow). Of other lengths: at the middle scale (VAR) or a third of the tokens (LlamaGen). Give --starts and --split
where it was trained otherwise."""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "convert",
        help="upstream's checkpoints to a model folder and back",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "state", metavar="STATE", help="a file, folder or hub id of upstream's, or a model in our format"
    )
    parser.add_argument("--family", choices=KINDS, required=True, help="what it is; dd1-* are published students")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--tokenizer", metavar="STATE", help="upstream's tokenizer, to go into the folder")
    parser.add_argument("--patch-nums", type=numbers, metavar="N,N,...", help="VAR: side of each scale's grid")
    parser.add_argument(
        "--n-head", type=at_least(1), help="LlamaGen: heads (default: of the published size, else width / 64)"
    )
    parser.add_argument(
        "--block-size", type=at_least(1), help="LlamaGen: tokens (default: of the published file's name, else 256)"
    )
    parser.add_argument(
        "--num-classes", type=at_least(1), help="leave out the classes from this one on, which were never trained"
    )
    parser.add_argument("--starts", type=numbers, metavar="N,N,...", help="students: tokens it goes on from")
    parser.add_argument("--split", type=at_least(0), help="students: positions before it are tokens, the rest vectors")
    parser.set_defaults(run=run)


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers, by commas."""
    read = at_least(0)
    try:
        return tuple(read(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no list of whole numbers, such as 1,2,3") from None


def run(args: argparse.Namespace) -> None:
    options = Options(
        patch_nums=args.patch_nums,
        n_head=args.n_head,
        block_size=args.block_size,
        num_classes=args.num_classes,
        starts=args.starts,
        split=args.split,
    )
    parts = convert(args.state, args.family, args.out, tokenizer=args.tokenizer, options=options)
    print(f"{args.family}: {' and '.join(parts)} -> {args.out}")
