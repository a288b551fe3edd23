"""Kill commands at random moments, run them again to their end, and compare with runs that were left alone.

    .venv/bin/python tools/measure_survival.py --kills 20 --seed 0

The models are tiny and random, the runs take seconds. Each is a process of its own, forked off one that has imported
all. SIGKILL falls anywhere within the length of the run that was left alone. Then no file may be torn: all that have
their final names are read, checksums included. The run that goes on must end with the same files: byte for byte, but
for the seconds in a log and the order in which `optimizer.pt` is pickled. Prints a Markdown table; exit status 1 where
anything differs, and then keeps its folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.numpy import load_file

from ddecode.checkpoint import family_module, save_model
from ddecode.cli import main as ddecode
from ddecode.evaluation.blocks import read_block
from ddecode.images import check_png
from ddecode.locks import NAME as LOCK
from ddecode.pairs import read_shard
from ddecode.randomness import fresh_weights
from ddecode.run_folder import OPTIMIZER, SUMS, sha256
from ddecode.teacher import Recipe

COMMANDS = ("pairs", "distill", "eval", "sample")
NEEDED = ("pairs", "distill")
"""Their results are read by others."""
TOKENIZER = {
    "vocab_size": 32, "code_width": 8, "channels": 32, "channel_mult": (1, 1, 1, 1), "res_blocks": 1, "z_channels": 32,
}  # fmt: skip
BACKBONE = {"vocab_size": 32, "width": 32, "depth": 2, "heads": 2, "tokens": 16, "num_classes": 10}
RECIPE = {
    "pairs": {"num": 256, "batch": 8, "shard_size": 16, "num_steps": 8},
    "student": {"starts": [0, 4], "split": 10},
    "objective": {  # all kinds of terms, each from a step of its own
        "embeddings": {0.0: 0.5, 0.5: 0.0}, "perceptual": {0.25: 0.1}, "energy": {0.25: 1.0}, "own_prefix": 0.5,
        "adversarial": {"weight": {0.5: 0.1}, "width": 8}, "image_batch": 4,
        "energy_memory": (2, 1), "matching": {"weight": {0.2: 1.0}},
        "score": {
            "weight": {0.3: 1.0}, "updates": 2, "align_every": 4, "align_steps": 1,
            "tuning": {"steps": 4, "batch": 4, "lr": 1e-3, "warmup_steps": 1, "log_every": 1, "save_every": 2},
        },
    },
    "training": {
        "steps": 10, "batch": 4, "lr": 1e-3, "warmup_steps": 2, "log_every": 1, "save_every": 2, "preview_every": 4,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one command's runs."""

    command: str
    kills: int
    seconds: float
    """Of the run that was left alone."""
    differing: list[str]
    """Runs that did not end as it did, with the files."""
    torn: list[str]


def prepare(work: Path) -> None:
    """A teacher, and the recipe of its student."""
    family = family_module("llamagen")
    with fresh_weights(0):
        tokenizer = family.build_tokenizer(family.TokenizerConfig(**TOKENIZER), None)
        teacher = family.build_teacher(family.BackboneConfig(**BACKBONE), tokenizer, None, Recipe(guidance_scale=1.5))
        for parameter in teacher.backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    config = {
        "family": "llamagen", "features": "fashion-eval", "tokenizer": tokenizer.config,
        "teacher": {"backbone": teacher.backbone.config, "recipe": teacher.recipe},
    }  # fmt: skip
    save_model(work / "model", config, {"tokenizer": tokenizer, "teacher": teacher.backbone})
    (work / "recipe.yaml").write_text(yaml.safe_dump({"teacher": str(work / "model")} | RECIPE))


def arguments_of(command: str, work: Path, out: Path) -> list[str]:
    """How a command begins and, alike, goes on."""
    recipe, references = ["--config", str(work / "recipe.yaml")], work / "references"
    pairs, model = ["--pairs", str(references / "pairs")], str(references / "distill" / "model")
    return {
        "pairs": ["pairs", *recipe, "--out", str(out)],
        "distill": ["distill", *recipe, *pairs, "--resume", "--out", str(out)],
        "eval": ["eval", model, "--num", "40", "--batch", "8", "--steps", "2", "--json", str(out / "eval.json")],
        "sample": ["sample", model, "--steps", "2", "--num", "100", "--batch", "4", "--out", str(out)],
    }[command]


# --- processes ------------------------------------------------------------------------------------------------


def start(arguments: list[str], log: Path) -> int:
    """The process of a command; what it prints goes to `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for printed in (sys.stdout, sys.stderr):
            os.dup2(stream, printed.fileno())
        status = ddecode(arguments)
        sys.stdout.flush()
    finally:
        os._exit(status)


def finish(child: int, log: Path) -> None:
    """Wait for its end, which must be a good one."""
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError(log.read_text().replace("\r", "\n").strip().rsplit("\n", 1)[-1])


def killed(arguments: list[str], log: Path, seconds: float) -> bool:
    """Kill a command after so many seconds; False where it had ended by then."""
    child, end = start(arguments, log), time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


# --- files ----------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, Path]:
    """All files that have their final names, by these."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if ".new" not in name and path.name != LOCK}


def read(path: Path) -> Any:
    """The content of a file, checked against the checksums that there are.

    Raises:
        Exception: it is torn.
    """
    if path.name == SUMS:
        sums = {name: digest for digest, name in (line.split("  ") for line in path.read_text().splitlines())}
        if sums != {file.name: sha256(file) for file in path.parent.iterdir() if file != path}:
            raise ValueError(f"{path} says otherwise")
        return sorted(sums)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    if path.name == OPTIMIZER:
        if zipfile.ZipFile(path).testzip():
            raise ValueError(f"{path} is torn")
        return torch.load(path, weights_only=True)
    check: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text()), ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".npz": read_block, ".png": check_png, ".safetensors": load_file,
    }  # fmt: skip
    (read_shard if path.name.startswith("shard-") else check[path.suffix])(path)
    return path.read_bytes()


def torn_files(folder: Path) -> list[str]:
    torn = []
    for name, path in files_of(folder).items():
        try:
            read(path)
        except Exception as error:
            torn.append(f"{name}: {error!r}")
    return torn


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def differing_files(folder: Path, reference: Path) -> list[str]:
    ours, theirs = files_of(folder), files_of(reference)
    both = ours.keys() & theirs.keys()
    return sorted(ours.keys() ^ theirs.keys()) + [
        name for name in both if not same(read(ours[name]), read(theirs[name]))
    ]


# --- runs -----------------------------------------------------------------------------------------------------


def reference_run(command: str, work: Path) -> float:
    """Seconds of a run that is left alone."""
    log, begin = work / "log", time.monotonic()
    finish(start(arguments_of(command, work, work / "references" / command), log), log)
    return time.monotonic() - begin


def measure(command: str, work: Path, *, seconds: float, kills: range, seed: int) -> Outcome:
    log = work / "log"
    differing, torn = [], []
    for number in kills:
        rng = random.Random(f"{command} {seed} {number}")
        out = work / f"{command}-{number}"
        arguments = arguments_of(command, work, out)
        while not killed(arguments, log, rng.uniform(0, seconds)):
            shutil.rmtree(out)
        torn += [f"{out}/{file}" for file in torn_files(out)]
        finish(start(arguments, log), log)
        if names := differing_files(out, work / "references" / command):
            differing.append(f"{out}: {', '.join(names)}")
        else:
            shutil.rmtree(out)
    return Outcome(command=command, kills=len(kills), seconds=seconds, differing=differing, torn=torn)


def line(outcome: Outcome) -> str:
    equal = outcome.kills - len(outcome.differing)
    return f"| `{outcome.command}` | {outcome.seconds:.1f} | {outcome.kills} | {equal} | {len(outcome.torn)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=COMMANDS, help="this command alone (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="of each command (default: %(default)s)")
    parser.add_argument("--done", type=int, default=0, help="how many of these other runs have seen to")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # others would not be there in a fork

    work = Path(tempfile.mkdtemp(prefix="survival-"))
    prepare(work)
    chosen = [args.only] if args.only else COMMANDS
    print("| command | seconds | kills | resumed equal | torn files |\n|---|---|---|---|---|", flush=True)
    failures = []
    for command in COMMANDS:
        if command in NEEDED or command in chosen:
            seconds = reference_run(command, work)
        if command in chosen:
            outcome = measure(command, work, seconds=seconds, kills=range(args.done, args.kills), seed=args.seed)
            print(line(outcome), flush=True)
            failures += outcome.differing + outcome.torn
    if failures:
        sys.exit("\n".join(failures))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
