"""Time against sequential passes of the networks, as one PNG."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ddecode.benchmark import BenchmarkResult, BenchmarkRow

WIDTH, HEIGHT = 1200, 800
LEFT, RIGHT, TOP, BOTTOM = 110, 40, 90, 80
COLORS = ("#1f5f99", "#c8501e", "#2e8b57", "#7a4fa3", "#8a6d1f", "#555555")
"""Of batch sizes, in turn."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A logarithmic axis: `low` to `high` over pixels `begin` to `end`."""

    low: float
    high: float
    begin: int
    end: int

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [v for p in powers for m in (1, 2, 5) if self.low <= (v := m * 10.0**p) <= self.high]


def draw(result: BenchmarkResult, title: str) -> bytes:
    """The rows as points, median with 10th to 90th percentile, both axes logarithmic; a colour for each batch size.

    Args:
        result: plans without a network pass (those that skip everything) are left out.
        title: what was measured.

    Returns:
        A PNG file.
    """
    rows = [row for row in result.rows if row.network_evaluations]
    passes = [row.network_evaluations for row in rows]
    times_ms = [1e3 * seconds for row in rows for seconds in (row.p10_s, row.p90_s, row.median_s)]
    x = Axis(low=0.7 * min(passes), high=1.4 * max(passes), begin=LEFT, end=WIDTH - RIGHT)
    y = Axis(low=0.7 * min(times_ms), high=1.4 * max(times_ms), begin=HEIGHT - BOTTOM, end=TOP)
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas = ImageDraw.Draw(picture)
    draw_axes(canvas, x, y)
    heading = f"{title}: time from noise to images, {rows[0].dtype}, {'compiled' if result.compiled else 'eager'}"
    canvas.text((LEFT, 14), heading, "black", font_size=24)
    canvas.text((LEFT, 46), f"{result.machine}, {rows[0].threads} threads", "#555555", font_size=18)
    for index, batch in enumerate(dict.fromkeys(row.batch for row in rows)):
        color = COLORS[index % len(COLORS)]
        draw_rows(canvas, [row for row in rows if row.batch == batch], x, y, color)
        canvas.text((WIDTH - RIGHT, 46 + 22 * index), f"batch {batch}", color, font_size=18, anchor="ra")
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def draw_axes(canvas: ImageDraw.ImageDraw, x: Axis, y: Axis) -> None:
    for value in x.ticks():
        at = x.place(value)
        canvas.line((at, y.end, at, y.begin), "#e4e4e4")
        canvas.text((at, y.begin + 8), f"{value:g}", "black", font_size=18, anchor="ma")
    for value in y.ticks():
        at = y.place(value)
        canvas.line((x.begin, at, x.end, at), "#e4e4e4")
        canvas.text((x.begin - 8, at), f"{value:g}", "black", font_size=18, anchor="rm")
    canvas.rectangle((x.begin, y.end, x.end, y.begin), outline="#888888")
    canvas.text(((x.begin + x.end) / 2, HEIGHT - 12), "network evaluations", "black", font_size=20, anchor="ms")
    canvas.text((12, TOP - 8), "ms", "black", font_size=20, anchor="ls")


def draw_rows(canvas: ImageDraw.ImageDraw, rows: Sequence[BenchmarkRow], x: Axis, y: Axis, color: str) -> None:
    for row in rows:
        across, up = x.place(row.network_evaluations), y.place(1e3 * row.median_s)
        canvas.line((across, y.place(1e3 * row.p10_s), across, y.place(1e3 * row.p90_s)), color, 3)
        canvas.ellipse((across - 7, up - 7, across + 7, up + 7), color)
        name = row.plan if ":" in row.plan or row.plan == "teacher" else f"student {row.plan}"
        label = f"{name}: {1e3 * row.median_s:.0f} ms"
        near_right = across + canvas.textlength(label, font_size=18) + 14 > x.end
        canvas.text(
            (across + (-14 if near_right else 14), up), label, color, font_size=18, anchor="rm" if near_right else "lm"
        )
