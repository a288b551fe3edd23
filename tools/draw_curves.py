"""Draw a run's curves from its `log.jsonl` as one SVG, a panel for each metric.

    .venv/bin/python tools/draw_curves.py docs/curves/fashion-var.jsonl --out docs/curves/fashion-var.svg

Thin: as logged; thick: smoothed over a tenth of the run. Of a metric by position there is a smoothed curve for each
eighth of the sequence, from its first tokens (blue) to its last (red).

N rows of the log, G curves of a panel.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ddecode.files import write_aside
from ddecode.reporters import grouped

WIDTH, HEIGHT, MARGIN, COLUMNS = 300, 150, 44, 3
LEFT_OUT = ("step", "seconds", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = draw([json.loads(line) for line in args.log.read_text().splitlines()])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(args.out, text.encode())


def draw(rows: list[dict[str, Any]]) -> str:
    """The SVG of a log."""
    known = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    names = [name for name in known if name not in LEFT_OUT]
    panels = []
    for index, name in enumerate(names):
        logged = [row for row in rows if row.get(name) is not None]
        steps_N = np.array([row["step"] for row in logged])
        values_NG = np.array([grouped(np.atleast_1d(row[name]).tolist()) for row in logged])
        left, top = index % COLUMNS * (WIDTH + MARGIN) + MARGIN, index // COLUMNS * (HEIGHT + MARGIN) + 24
        panels.append(panel(name, steps_N, values_NG, rows[-1]["step"], left, top))
    across, down = COLUMNS * (WIDTH + MARGIN) + 12, -(-len(names) // COLUMNS) * (HEIGHT + MARGIN) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n'
    )


def panel(name: str, steps_N: np.ndarray, values_NG: np.ndarray, last_step: int, left: int, top: int) -> str:
    """One metric over the steps, with its least and largest value at the side."""
    x_N = left + steps_N / last_step * WIDTH
    window, groups = max(1, len(steps_N) // 10), values_NG.shape[1]
    smooth_MG = np.stack([np.convolve(values, np.ones(window) / window, "valid") for values in values_NG.T], 1)
    drawn = values_NG if groups == 1 else smooth_MG
    low, high = drawn.min(), drawn.max()
    lines = [polyline(x_N, height_of(values_NG[:, 0], low, high, top), "#9bb8d3", 1)] if groups == 1 else []
    if groups > 1 or window > 1:
        colors = (
            ["#1f5f99"] if groups == 1 else [f"hsl({220 - 220 * g // (groups - 1)},70%,45%)" for g in range(groups)]
        )
        for smooth_M, color in zip(smooth_MG.T, colors, strict=True):
            lines.append(polyline(x_N[window - 1 :], height_of(smooth_M, low, high, top), color, 2))
    return (
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>{"".join(lines)}'
        f'<text x="{left}" y="{top - 6}" font-weight="bold">{name}</text>'
        f'<text x="{left - 4}" y="{top + 10}" text-anchor="end" font-size="10">{high:.3g}</text>'
        f'<text x="{left - 4}" y="{top + HEIGHT}" text-anchor="end" font-size="10">{low:.3g}</text>'
        f'<text x="{left + WIDTH}" y="{top + HEIGHT + 13}" text-anchor="end" font-size="10">step {last_step}</text>'
    )


def height_of(values: np.ndarray, low: float, high: float, top: int) -> np.ndarray:
    return top + HEIGHT * (1 - (values - low) / max(high - low, 1e-12))


def polyline(x: np.ndarray, y: np.ndarray, color: str, width: int) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}"/>'


if __name__ == "__main__":
    main()
