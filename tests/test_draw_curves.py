"""The curves of a log: a panel for each metric, by position where it has one."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools import draw_curves
from tools.draw_curves import draw, main

SVG = "{http://www.w3.org/2000/svg}"


def test_a_panel_for_each_metric_and_a_curve_for_each_group() -> None:
    rows = [
        {"step": n, "loss": 1.0, "error": 1 / n, "error_K": [1 / n, 2 / n, 3.0]} | ({"seldom": n} if n == 9 else {})
        for n in range(1, 41)
    ]
    root = ElementTree.fromstring(draw(rows))
    titles = [text.text for text in root.iter(f"{SVG}text") if text.get("font-weight") == "bold"]
    assert titles == ["error", "error_K", "seldom"]
    lines = list(root.iter(f"{SVG}polyline"))
    assert len(lines) == 2 + 3 + 1
    assert [len(line.get("points", "").split()) for line in lines] == [40, 37, 37, 37, 37, 1]
    last = [float(line.get("points", "").split()[-1].split(",")[1]) for line in lines[2:5]]
    assert last[0] > last[1] > last[2], "the largest value stands highest"


def test_the_tool_writes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "a": None, "b": 2.0}) + "\n")
    out = tmp_path / "new" / "curves.svg"
    monkeypatch.setattr(sys, "argv", [draw_curves.__name__, str(tmp_path / "log.jsonl"), "--out", str(out)])
    main()
    assert ElementTree.parse(out).getroot().tag == f"{SVG}svg"
