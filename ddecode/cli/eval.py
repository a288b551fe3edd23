"""`ddecode eval`: judge a model, or images that are there already, by a named protocol."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddecode.arguments import LARGEST_SEED
from ddecode.checkpoint import ModelFolder
from ddecode.cli.arguments import MODEL_HELP, add_device, add_with, at_least, model_name, open_pipeline, read_steps
from ddecode.evaluation import protocols, zoo
from ddecode.evaluation.blocks import Blocks, kept_beside
from ddecode.evaluation.features import features_folder
from ddecode.evaluation.fidelity import INCEPTION, Inception
from ddecode.evaluation.protocols import PROTOCOLS, Inspector
from ddecode.evaluation.reference import Reference
from ddecode.evaluation.results import as_json
from ddecode.files import check_writable, write_aside
from ddecode.images import ImageSet, is_image_set
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan
from ddecode.processes import launch, rank

EPILOG = """\
zoo judges models against their teacher and real images, by the feature network that their config names. adm and dd1
are for models of ImageNet; they need the extra ddecode[fidelity], Inception's weights and a reference. adm: as many
images of each class, Inception as in TensorFlow, VIRTUAL_imagenet256_labeled.npz. dd1: uniform labels, Inception and
statistics as in pytorch-fid.
Compare results of --json with ddecode compare."""
STEPS = "teacher,1,2"


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "eval",
        help="judge a model by a named protocol",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"{MODEL_HELP}; or images: an .npz with arr_0, or a folder of PNGs"
    )
    add_with(parser)
    parser.add_argument("--steps", help=f"comma-separated (default: {STEPS})")
    parser.add_argument("--plan", action="append", default=[], help="a further plan; may be repeated")
    parser.add_argument(
        "--num", type=at_least(1), help=f"images of each set (default: {zoo.NUM}; adm, dd1: {protocols.NUM})"
    )
    parser.add_argument("--seed", type=at_least(0, LARGEST_SEED), help="of a model's images (default: 0)")
    parser.add_argument(
        "--batch",
        type=at_least(1),
        help=f"images at once (default: {zoo.BATCH}; adm, dd1: {protocols.BATCH}); fewer where memory does not do",
    )
    parser.add_argument("--protocol", choices=("zoo", *PROTOCOLS), default="zoo")
    parser.add_argument("--features", type=Path, metavar="FOLDER", help="zoo: another feature network")
    parser.add_argument(
        "--inception", metavar="FILE", help=f"adm, dd1: {INCEPTION}, a path or owner/name/file of the hub"
    )
    parser.add_argument("--reference", type=Path, metavar="FILE", help="adm, dd1: .npz or .pth of statistics or images")
    add_device(parser)
    parser.add_argument("--json", type=Path, help="write the result here as well; stopped, it goes on if run again")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_writable(args.json, "--json")
    launch()
    recorded = args.json is not None and rank() == 0 and not is_image_set(Path(args.model))
    model_hash = ModelFolder.open(args.model).model_hash() if recorded else None
    with kept_beside(args.json) as blocks:
        result = (judge_zoo if args.protocol == "zoo" else judge_fidelity)(args, blocks)
        if rank() == 0:
            print(zoo.table(result) if isinstance(result, zoo.ZooResult) else protocols.table(result))
            if args.json:
                write_aside(args.json, (as_json(replace(result, model_hash=model_hash)) + "\n").encode())


def judge_zoo(args: argparse.Namespace, blocks: Blocks) -> zoo.ZooResult:
    if args.inception or args.reference:
        raise ValueError("--inception and --reference go with --protocol adm or dd1; zoo has its own")
    if is_image_set(Path(args.model)):
        raise ValueError(f"protocol zoo judges models; {args.model} holds images: choose --protocol adm or dd1")
    folder = ModelFolder.open(args.model)
    judge = open_judge(folder, args.features)
    pipe, plans = open_plans(args)
    num = args.num or zoo.NUM
    return zoo.evaluate(
        pipe, plans, judge, model=model_name(args.model), num=num, seed=args.seed or 0, batch=args.batch or zoo.BATCH,
        blocks=blocks,
    )  # fmt: skip


def judge_fidelity(args: argparse.Namespace, blocks: Blocks) -> protocols.FidelityResult:
    if args.features is not None:
        raise ValueError(f"--features goes with --protocol zoo; {args.protocol} judges by Inception")
    if args.inception is None or args.reference is None:
        raise ValueError(f"protocol {args.protocol} needs --inception {INCEPTION} and --reference FILE")
    num = args.num or protocols.NUM
    if is_image_set(Path(args.model)):
        if args.steps or args.plan or args.others or args.seed is not None:
            raise ValueError(f"{args.model} holds images: --steps, --plan, --with and --seed go with models")
        images = ImageSet.open(Path(args.model))
        protocols.check_images(images, PROTOCOLS[args.protocol], num)
        batch = args.batch or protocols.BATCH
        return protocols.evaluate_images(images, open_inspector(args), num=num, batch=batch, blocks=blocks)
    pipe, plans = open_plans(args)
    protocols.check_num(num, pipe.num_classes, PROTOCOLS[args.protocol])
    inspector = open_inspector(args)
    return protocols.evaluate(
        pipe, plans, inspector, model=model_name(args.model), num=num, seed=args.seed or 0,
        batch=args.batch or protocols.BATCH, blocks=blocks,
    )  # fmt: skip


def open_plans(args: argparse.Namespace) -> tuple[DistilledPipeline, dict[str, Plan]]:
    pipe = open_pipeline(args).to(args.device)
    asked = read_steps(STEPS if args.steps is None else args.steps)
    plans: dict[str, Plan] = {str(steps): pipe.plan(steps) for steps in asked}
    return pipe, plans | {text: pipe.plan(plan=text) for text in args.plan}


def open_inspector(args: argparse.Namespace) -> Inspector:
    protocol = PROTOCOLS[args.protocol]
    extractor = Inception.open(args.inception, resize=protocol.resize, device=args.device)
    reference = Reference.open(args.reference, extractor, batch=args.batch or protocols.BATCH)
    return Inspector(protocol=protocol, extractor=extractor, reference=reference)


def open_judge(folder: ModelFolder, chosen: Path | None = None) -> zoo.Judge:
    """The feature network that is chosen, or that a model's config names.

    Raises:
        ValueError: it is not there.
    """
    if chosen is not None:
        return zoo.Judge.open(chosen)
    name = folder.config.get("features")
    if name is None:
        raise ValueError(f"{folder.path.name} names no feature network to judge it by: give --features FOLDER")
    if not features_folder(str(name)).is_dir():
        raise ValueError(f"{folder.path.name} is judged by {name}, which is not here: give --features FOLDER")
    return zoo.Judge.open(features_folder(str(name)))
