"""Two processes of a launch make what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Capture, refused
from tiny import distill_recipe, tree_of, write_yaml
from torch import distributed

from ddecode import processes
from ddecode.processes import in_turn, launch, leave_at_exit, mean_of_all, of_all, share, tell_alone
from tools.measure_survival import prepare

ROOT = Path(__file__).resolve().parents[1]
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
LAUNCH = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
SHORT = ["training.steps=4", "objective.score.tuning=null"]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets beside `--multi_gpu`."""


def commands(work: Path, out: Path, student: Path) -> list[tuple[dict[str, str], list[str]]]:
    """Pairs, students of all terms, images and an evaluation."""
    recipe = ["--config", f"{work}/recipe.yaml"]
    distill = ["distill", *recipe, "--pairs", f"{out}/pairs"]
    return [
        ({}, ["pairs", *recipe, "--out", f"{out}/pairs", "pairs.num=40"]),
        ({ACCUMULATION: "1"}, [*distill, "--out", f"{out}/run"]),
        ({ACCUMULATION: "2"}, [*distill, "--out", f"{out}/parts", *SHORT]),
        ({}, ["sample", str(student), "--steps", "2", "--num", "18", "--batch", "4", "--out", f"{out}/samples"]),
        ({}, ["eval", str(student), "--num", "24", "--batch", "8", "--steps", "2", "--json", f"{out}/eval.json"]),
    ]


def start(launcher: list[str], todo: list[tuple[dict[str, str], list[str]]], file: Path) -> None:
    file.write_text(json.dumps(todo))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "tests/launched.py", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_processes_make_what_one_does(tmp_path: Path) -> None:
    prepare(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    student = one / "run" / "model"
    start([], commands(tmp_path, one, student), tmp_path / "one.json")
    recipe = ["--config", f"{tmp_path}/recipe.yaml", "--pairs", f"{two}/pairs"]
    sharded = ({ACCUMULATION: "2"} | FSDP, ["distill", *recipe, "--out", f"{two}/sharded", *SHORT])
    start(LAUNCH, [*commands(tmp_path, two, student), sharded], tmp_path / "two.json")

    for folder in ("pairs", "samples"):
        assert tree_of(one / folder) == tree_of(two / folder) and len(tree_of(one / folder)) >= 4
    assert (one / "eval.json").read_bytes() == (two / "eval.json").read_bytes()
    assert not (two / "eval.json.blocks").exists()
    for run, metric, other in (
        ("run", "energy", "run"), ("run", "score_gap", "run"), ("run/tuning", "velocity_error", "run/tuning"),
        ("parts", "energy", "parts"), ("parts", "verdict_student", "sharded"),
    ):  # fmt: skip
        ours, theirs = losses(one / run), losses(two / other)
        assert any(metric in row for row in ours)
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys() and (a.pop("grad_norm") is None) == (b.pop("grad_norm") is None)
            for key in a.keys() - {"seconds"}:  # vectors are logged to four digits
                assert b[key] == pytest.approx(a[key], rel=2e-3 if key.endswith(("_K", "_L")) else 1e-4, abs=1e-5), key
    for run, other in (("run", "run"), ("parts", "sharded")):
        assert sorted(tree_of(one / run)) == sorted(tree_of(two / other))


def test_alone_a_process_does_everything() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert list(in_turn(lambda i: 2 * i, range(5))) == [0, 2, 4, 6, 8] and share(range(5)) == range(5)
    assert of_all(x) is x
    assert mean_of_all(x.sum(), 4).item() == 0.75 and mean_of_all(x.sum() * 0, 0).item() == 0


def test_a_launch_that_did_not_happen_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """`accelerate launch --cpu --num_processes 2` sets these and starts one process."""
    for told in (False, True):
        tell_alone.cache_clear()
        processes.launch()
        assert ("started one process only" in capsys.readouterr().err) == told
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_a_process_parts_from_the_others_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr("atexit.register", registered.append)
    leave_at_exit.cache_clear()
    launch()
    assert not registered, "alone there is nobody to part from"
    leave_at_exit()
    leave_at_exit()
    (leave,) = registered
    leave()  # of no group
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    leave()
    assert not distributed.is_initialized()
    leave_at_exit.cache_clear()


def test_the_other_process_has_ended_is_no_mistake_of_ours(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def torn(*arguments: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr("ddecode.cli.pairs.write_pairs", torn)
    arguments = ["pairs", "--config", write_yaml(tmp_path / "recipe.yaml", distill_recipe(model)), "--out", tmp_path]
    with pytest.raises(RuntimeError):
        refused(capsys, *arguments)
    monkeypatch.setattr(processes, "world", lambda: 2)
    assert "another process of the launch has ended" in refused(capsys, *arguments)
