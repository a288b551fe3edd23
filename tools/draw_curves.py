"""Draw a run's curves from its `log.jsonl` as one SVG, a panel for each metric.

    .venv/bin/python tools/draw_curves.py docs/curves/fashion-var.jsonl --out docs/curves/fashion-var.svg

Thin: as logged; thick: smoothed over a tenth of the run. Metrics that are vectors are drawn as their mean.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from ddecode.files import write_aside

WIDTH, HEIGHT, MARGIN, COLUMNS = 300, 150, 44, 3
LEFT_OUT = ("step", "seconds", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.log.read_text().splitlines()]
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in LEFT_OUT]
    panels = []
    for index, name in enumerate(names):
        points = [(row["step"], float(np.mean(row[name]))) for row in rows if row.get(name) is not None]
        left, top = index % COLUMNS * (WIDTH + MARGIN) + MARGIN, index // COLUMNS * (HEIGHT + MARGIN) + 24
        panels.append(panel(name, np.array(points), rows[-1]["step"], left, top))
    across, down = COLUMNS * (WIDTH + MARGIN) + 12, -(-len(names) // COLUMNS) * (HEIGHT + MARGIN) + 8
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n'
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(args.out, text.encode())


def panel(name: str, points_N2: np.ndarray, last_step: int, left: int, top: int) -> str:
    """One metric over the steps, with its least and largest value at the side."""
    steps, values = points_N2.T
    low, high = values.min(), values.max()
    x = left + steps / last_step * WIDTH
    lines = [polyline(x, height_of(values, low, high, top), "#9bb8d3", 1)]
    window = max(1, len(values) // 10)
    if window > 1:
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        lines.append(polyline(x[window - 1 :], height_of(smooth, low, high, top), "#1f5f99", 2))
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
