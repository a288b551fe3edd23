"""Quality against latency along the switch point of stitched plans, both orders: small teacher first (T-Stitch, arXiv
2402.14167), large teacher first (CoDe, arXiv 2411.17787), and the control that skips what the small one would emit.

    .venv/bin/python tools/measure_stitching.py fashion-llamagen --num 4000 --seed 1 --json stitching.json

Prints a Markdown table: Fréchet distance to the real images by protocol `zoo`, its ratio to the large teacher's (the
mean of that protocol's two sets of teacher samples), E, and the median latency with its ratio, all timed in turns.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ddecode.benchmark import benchmark
from ddecode.checkpoint import ModelFolder
from ddecode.cli.arguments import add_model, add_with, open_pipeline
from ddecode.cli.eval import open_judge
from ddecode.evaluation.zoo import evaluate
from ddecode.files import write_aside


def switch_points(steps: tuple[int, ...], points: int) -> list[int]:
    """Token positions between AR steps: `points` of them, evenly spread over the steps."""
    boundaries = [sum(steps[:k]) for k in range(1, len(steps))]
    if len(boundaries) <= points:
        return boundaries
    return [boundaries[round((i + 1) * len(steps) / (points + 1)) - 1] for i in range(points)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    add_with(parser)
    parser.add_argument("--small", default="small", help="the small teacher's name in plans")
    parser.add_argument("--points", type=int, default=7, help="switch points")
    parser.add_argument("--num", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="of the timing")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pipe = open_pipeline(args)
    assert pipe.teacher is not None
    length, small = pipe.length, args.small
    points = switch_points(pipe.teacher.steps, args.points)
    texts = [f"{small}:0-{length}"]
    texts += [f"{small}:0-{k},teacher:{k}-{length}" for k in points]
    texts += [f"teacher:0-{k},{small}:{k}-{length}" for k in points]
    texts += [f"teacher:0-{k},skip:{k}-{length}" for k in points]
    judge = open_judge(ModelFolder.open(args.model))
    plans = {text: pipe.plan(plan=text) for text in texts}
    quality = evaluate(pipe, plans, judge, model=args.model, num=args.num, seed=args.seed)
    speed = benchmark(pipe, ["teacher", *texts], (args.batch,), repeats=args.repeats)
    latency = {row.plan: row for row in speed.rows}

    first = quality.rows[0]
    assert first.plan == "teacher" and first.ratio is not None
    teachers = (first.frechet + first.frechet / first.ratio) / 2
    print(f"protocol zoo, n {args.num} a set, seed {args.seed}, features {quality.feature_hash}; latency at batch")
    print(f"{args.batch}, fp32, {speed.rows[0].threads} threads, {speed.machine}, median of {args.repeats}")
    print("\n| plan | FD to real | over teacher's | E | ms | speed-up |\n|---|---|---|---|---|---|")
    for row in quality.rows:
        if row.plan in latency:
            timed = latency[row.plan]
            print(
                f"| `{row.plan}` | {row.frechet:.2f} | {row.frechet / teachers:.2f} | {row.control_share:.2%} "
                f"| {timed.median_s * 1e3:.1f} | {timed.speedup:.2f}× |"
            )
    if args.json:
        result = {"quality": asdict(quality), "speed": speed.as_dict()}
        write_aside(args.json, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
