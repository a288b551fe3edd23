"""Killed runs go on as if nothing had happened: the harness in short, and what it leaves out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import run
from tiny import distill_recipe, tree_of, write_yaml

from ddecode.pairs import Pairs

ROOT = Path(__file__).resolve().parents[1]


def test_every_command_survives_a_kill() -> None:
    done = subprocess.run(
        [sys.executable, "tools/measure_survival.py", "--kills", "1"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    assert [(row[1].strip(), *map(int, row[3:6])) for row in rows] == [
        (f"`{command}`", 1, 1, 0) for command in ("pairs", "distill", "eval", "sample")
    ]


def test_fresh_noise_and_kept_probabilities_go_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a run that goes on is empty at first."""
    recipe = write_yaml(tmp_path / "recipe.yaml", distill_recipe(model))
    assert run("pairs", "--config", recipe, "--out", tmp_path / "pairs") == 0

    def distill(out: str) -> int:
        overrides = ["student.split=null", "student.drafts=[1]", "training.steps=13", "objective.cache_gib=1"]
        overrides += ["objective.fresh_noise=true", "objective.targets=probabilities"]
        arguments = ["--config", recipe, "--pairs", tmp_path / "pairs", "--out", tmp_path / out, "--resume"]
        return run("distill", *arguments, *overrides)

    assert distill("whole") == 0
    batch, calls = Pairs.batch, []

    def killed(self: Pairs, indices: list[int]) -> Any:
        calls.append(indices)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return batch(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Pairs, "batch", killed)
        assert distill("parts") == 130
    assert distill("parts") == 0
    whole, parts = tree_of(tmp_path / "whole"), tree_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name in whole:
        if name.endswith((".safetensors", ".png", "state.json", "config.json")):
            assert whole[name] == parts[name], name
    rows = [[json.loads(row) | {"seconds": 0} for row in tree["log.jsonl"].splitlines()] for tree in (whole, parts)]
    assert rows[0] == rows[1] and len(rows[0]) == 13
