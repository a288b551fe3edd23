"""Pairs against plain teacher sampling, in one run: throughput, the share of the noise-to-token map, memory.

    .venv/bin/python tools/measure_pairs.py --config configs/fashion-llamagen.yaml
    .venv/bin/python tools/measure_pairs.py --config configs/llamagen-b.yaml --arch llamagen-b --batch 32
    .venv/bin/python tools/measure_pairs.py --config configs/var-d16.yaml --arch var-d16 --batch 8 --perplexity 300

Guidance, filtering, precision and evaluations are the recipe's. With --arch the teacher has the published size and
random weights; its head is then scaled so that its guided probabilities, before filtering, have the perplexity asked
for along random tokens, since the map's time depends on it.

One batch of pairs warms up. Then plain batches and batches of pairs, written to a folder as `ddecode pairs` does, take
turns; medians count. At the end come four batches in one go: the peak memory should not grow. The share is the time
inside `noise_to_tokens` over the whole time of the pairs. The last line is JSON.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ddecode import trajectory
from ddecode.benchmark import clock, machine_name, peak_bytes
from ddecode.checkpoint import ModelFolder
from ddecode.config import DistillConfig, PairsConfig, read_config
from ddecode.flow import noise_to_tokens
from ddecode.pairs import Manifest, make_manifest, write_pairs
from ddecode.teacher import Recipe, Teacher
from third_party_loaders.published import ARCHITECTURES, find, random_teacher, random_tokenizer

MIB = 2**20
RECIPE = Path(__file__).resolve().parents[1] / "configs" / "fashion-llamagen.yaml"


class MapClock:
    """Stands where `trajectory` calls the map, and adds up its seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        begin = time.perf_counter()
        ids_BL = noise_to_tokens(*args, **options)
        self.seconds += time.perf_counter() - begin
        return ids_BL


def scale_head(teacher: Teacher, recipe: Recipe, perplexity: float) -> None:
    """Give the guided probabilities this geometric mean perplexity along random tokens."""
    ids_BL = torch.randint(teacher.backbone.vocab_size, (2, teacher.length))
    guided = Recipe(guidance_scale=recipe.guidance_scale)
    log_p_BLV = teacher.log_probs(ids_BL, teacher.labels([0, 1], 2), guided)
    low, high = 1e-3, 1e3
    for _ in range(30):
        factor = (low * high) ** 0.5
        scaled = torch.log_softmax(factor * log_p_BLV, -1)
        entropy = -(scaled.exp() * scaled).sum(-1).mean()
        low, high = (factor, high) if entropy.exp() > perplexity else (low, factor)
    backbone: Any = teacher.backbone
    head = backbone.head if teacher.family == "var" else backbone.output
    for parameter in head.parameters():
        parameter.data *= factor


def make_teacher(args: argparse.Namespace, folder: str, config: PairsConfig) -> Teacher:
    """The recipe's own, or one of random weights."""
    if args.arch is None:
        return ModelFolder.open(folder).teacher()
    architecture, generator = find(args.arch), torch.Generator().manual_seed(0)
    teacher = random_teacher(architecture, random_tokenizer(architecture, generator), generator)
    scale_head(teacher, config.recipe or teacher.recipe, args.perplexity)
    return teacher


def sample_plainly(teacher: Teacher, manifest: Manifest) -> float:
    """Seconds of one batch of `teacher.generate`."""
    labels = manifest.labels(range(manifest.batch))
    begin = clock(teacher.device)
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=manifest.precision == "bf16"):
        teacher.generate(labels, **manifest.recipe, generator=torch.Generator().manual_seed(0))
    return clock(teacher.device) - begin


def make_pairs(teacher: Teacher, manifest: Manifest, batches: int) -> float:
    """Seconds of so many batches of pairs, written to a new folder."""
    manifest = dataclasses.replace(manifest, num=batches * manifest.batch)
    with tempfile.TemporaryDirectory() as folder:
        begin = clock(teacher.device)
        write_pairs(teacher, manifest, Path(folder), show_progress=False)
        return clock(teacher.device) - begin


def measure(teacher: Teacher, manifest: Manifest, repeats: int) -> dict[str, float]:
    make_pairs(teacher, manifest, 1)
    map_clock = trajectory.noise_to_tokens = MapClock()
    plain_s, pairs_s = [], []
    for _ in range(repeats):
        plain_s.append(sample_plainly(teacher, manifest))
        pairs_s.append(make_pairs(teacher, manifest, 1))
    peak = peak_bytes(teacher.device)
    four_s = make_pairs(teacher, manifest, 4)
    plain, pairs = (manifest.batch / statistics.median(seconds) for seconds in (plain_s, pairs_s))
    return {
        "plain_images_per_s": plain,
        "pairs_per_s": pairs,
        "pairs_over_plain": pairs / plain,
        "map_share": map_clock.seconds / (sum(pairs_s) + four_s),
        "peak_mib": peak / MIB,
        "peak_mib_4_batches": peak_bytes(teacher.device) / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=RECIPE, help="recipe of a distillation")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="random weights of this size instead of the teacher")
    parser.add_argument("--perplexity", type=float, default=800.0, help="of the random teacher")
    parser.add_argument("--batch", type=int, help="default: the recipe's")
    parser.add_argument("--repeats", type=int, default=1, help="batches of each kind, without the last four")
    args = parser.parse_args()
    recipe = read_config(args.config, DistillConfig, [])
    config = dataclasses.replace(recipe.pairs, batch=args.batch or recipe.pairs.batch)
    config = dataclasses.replace(config, shard_size=config.batch)
    teacher = make_teacher(args, recipe.teacher, config)
    manifest = make_manifest(teacher, str(args.arch), "random", config)
    found = measure(teacher, manifest, args.repeats)
    print(
        f"{args.arch or recipe.teacher} on {machine_name(teacher.device)}, {torch.get_num_threads()} threads, batch "
        f"{config.batch}, precision {config.precision}, {manifest.num_steps} evaluations, {manifest.recipe}"
        + (f", random weights at perplexity {args.perplexity:g}" if args.arch else "")
    )
    print(
        f"plain sampling {found['plain_images_per_s']:.3g} images/s, pairs {found['pairs_per_s']:.3g}/s "
        f"({found['pairs_over_plain']:.2f} of it), of which the map takes {found['map_share']:.1%}; peak memory "
        f"{found['peak_mib']:.0f} MiB, and {found['peak_mib_4_batches']:.0f} with four batches in one go"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
