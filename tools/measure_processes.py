"""What a second process brings to `ddecode pairs`: one process of one thread and two of one thread each, in turn.

    .venv/bin/python tools/measure_processes.py --num 1024 --batch 128 --repeats 2

Each is a launch of its own. It makes a batch to warm up, and then the pairs, timed from the first batch to the last
shard on disk. All must write the same bytes. Prints a Markdown table of the medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ddecode.checkpoint import ModelFolder
from ddecode.config import PairsConfig
from ddecode.pairs import make_manifest, write_pairs
from ddecode.processes import launch, meet, rank


def work(args: argparse.Namespace) -> None:
    """One process of a launch; the main one prints the seconds."""
    torch.set_num_threads(1)
    state = launch()
    folder = ModelFolder.open(args.model)
    teacher, name = folder.teacher().to(state.device), folder.teacher_hash()

    def write(num: int, out: Path) -> None:
        manifest = make_manifest(teacher, args.model, name, PairsConfig(num=num, batch=args.batch))
        write_pairs(teacher, manifest, out, show_progress=False)

    write(args.batch * state.num_processes, args.out / "warm-up")
    meet()
    begin = time.perf_counter()
    write(args.num, args.out / "pairs")
    if rank() == 0:
        print(time.perf_counter() - begin)


def seconds_of(processes: int, out: Path) -> float:
    """Of a launch of this script."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, "--", *sys.argv, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fashion-llamagen")
    parser.add_argument("--num", type=int, default=1024, help="pairs (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None:
        return work(args)

    rates: dict[int, list[float]] = {1: [], 2: []}
    written = set()
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for processes, found in rates.items():
                out = Path(folder) / f"{processes}-{repeat}"
                found.append(args.num / seconds_of(processes, out))
                written.add(tuple((path.name, path.read_bytes()) for path in sorted((out / "pairs").iterdir())))
    if len(written) > 1:
        sys.exit("the launches wrote different pairs")
    print("| processes | pairs/s | speed-up |\n|---|---|---|")
    alone = statistics.median(rates[1])
    for processes, found in rates.items():
        rate = statistics.median(found)
        print(f"| {processes} | {rate:.1f} | {rate / alone:.2f}× |")


if __name__ == "__main__":
    main()
