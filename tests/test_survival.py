"""Killed runs go on as if nothing had happened: the harness in short, and what it leaves out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Capture, run
from disk import room_for
from interruption import interrupted
from tiny import distill_recipe, make_student, make_teacher, save_tiny, tree_of, write_yaml

from ddecode.evaluation import zoo
from ddecode.pairs import Pairs
from ddecode.pipeline import DistilledPipeline

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


def test_fresh_noise_and_kept_probabilities_go_on(model: Path, tmp_path: Path) -> None:
    """The memory of a run that goes on is empty at first."""
    recipe = write_yaml(tmp_path / "recipe.yaml", distill_recipe(model))
    assert run("pairs", "--config", recipe, "--out", tmp_path / "pairs") == 0

    def distill(out: str) -> int:
        overrides = ["student.split=null", "student.drafts=[1]", "training.steps=13", "objective.cache_gib=1"]
        overrides += ["objective.fresh_noise=true", "objective.targets=probabilities"]
        arguments = ["--config", recipe, "--pairs", tmp_path / "pairs", "--out", tmp_path / out, "--resume"]
        return run("distill", *arguments, *overrides)

    assert distill("whole") == 0
    with interrupted(Pairs, "batch", at=10):
        assert distill("parts") == 130
    assert distill("parts") == 0
    whole, parts = tree_of(tmp_path / "whole"), tree_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name in whole:
        if name.endswith((".safetensors", ".png", "state.json", "config.json")):
            assert whole[name] == parts[name], name
    rows = [[json.loads(row) | {"seconds": 0} for row in tree["log.jsonl"].splitlines()] for tree in (whole, parts)]
    assert rows[0] == rows[1] and len(rows[0]) == 13


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of as many classes as the bundled judge knows. Shared: do not change it."""
    teacher = make_teacher(num_classes=10)
    pipe = DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher, student=make_student(teacher, split=10))
    return save_tiny(tmp_path_factory.mktemp("models") / "judged", pipe)


def arguments_of(verb: str, model: Path, folder: Path) -> list[Any]:
    """A command that writes below `folder` and, alike, goes on."""
    recipe = ["--config", write_yaml(folder / "recipe.yaml", distill_recipe(model))]
    return {
        "pairs": [*recipe, "--out", folder / "pairs"],
        "distill": [*recipe, "--pairs", folder / "pairs", "--out", folder / "run", "--resume"],
        "sample": [model, "--num", 6, "--batch", 2, "--out", folder / "samples"],
        "eval": [model, "--num", 20, "--batch", 5, "--steps", "1", "--json", folder / "eval.json"],
    }[verb]


def results_of(folder: Path) -> dict[str, Any]:
    """What must be equal in the end."""
    tree: dict[str, Any] = {name: data for name, data in tree_of(folder).items() if not name.endswith((".pt", "SUMS"))}
    for name in [name for name in tree if name.endswith(".jsonl")]:
        tree[name] = [json.loads(row) | {"seconds": 0} for row in tree[name].splitlines()]
    return tree


def begin(verb: str, model: Path, folder: Path) -> None:
    """What a command needs."""
    folder.mkdir(exist_ok=True)
    if verb == "distill":
        assert run("pairs", *arguments_of("pairs", model, folder)) == 0


def whole(verb: str, model: Path, folder: Path) -> dict[str, Any]:
    """The results of a run that is left alone, in a folder of its own of the same path."""
    begin(verb, model, folder)
    assert run(verb, *arguments_of(verb, model, folder)) == 0
    results = results_of(folder)
    shutil.rmtree(folder)
    return results


@pytest.mark.parametrize(("verb", "room"), [("pairs", 600), ("distill", 20_000), ("sample", 400), ("eval", 3000)])
def test_a_full_disk_is_told_and_the_run_goes_on(
    verb: str, room: int, judged: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "x"
    expected = whole(verb, judged, folder)
    begin(verb, judged, folder)
    arguments = arguments_of(verb, judged, folder)
    with room_for(room):
        assert run(verb, *arguments) == 2
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert last.startswith(f"ddecode {verb}: error: ") and "File too large" in last
    assert not list(folder.rglob("*.new"))
    assert run(verb, *arguments_of(verb, judged, folder)) == 0
    assert results_of(folder) == expected


@pytest.mark.parametrize(
    ("verb", "wrecked", "message", "deleted"),
    [
        ("pairs", "pairs/shard-00001.safetensors", "is damaged", None),
        ("distill", "run/checkpoint/model.safetensors", "is damaged", "run/checkpoint"),
        ("sample", "samples/000003-class3.png", "is no image, or damaged; delete it", None),
        ("eval", "eval.json.blocks/*-00002.npz", "is damaged; delete it", None),
    ],
)
def test_a_damaged_file_is_named_and_made_again(
    verb: str, wrecked: str, message: str, deleted: str | None, judged: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "x"
    expected = whole(verb, judged, folder)
    begin(verb, judged, folder)
    if verb == "eval":
        with interrupted(zoo, "table", at=1):  # the last thing before the result is written
            assert run(verb, *arguments_of(verb, judged, folder)) == 130
    else:
        assert run(verb, *arguments_of(verb, judged, folder)) == 0
    path = min(folder.glob(wrecked))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = tree_of(folder)
    assert run(verb, *arguments_of(verb, judged, folder)) == 2
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert str(path) in last and message in last and tree_of(folder) == before
    remains = folder / (deleted or path.relative_to(folder))
    assert str(remains) in last
    shutil.rmtree(remains) if deleted else remains.unlink()
    assert run(verb, *arguments_of(verb, judged, folder)) == 0
    assert results_of(folder) == expected


def test_an_evaluation_goes_on_where_it_stopped(judged: Path, tmp_path: Path) -> None:
    with interrupted(DistilledPipeline, "emit", at=7) as calls:
        assert run("eval", *arguments_of("eval", judged, tmp_path)) == 130
        assert len(list((tmp_path / "eval.json.blocks").glob("*.npz"))) == 6
        assert run("eval", *arguments_of("eval", judged, tmp_path)) == 0
    assert len(calls) == 7 + 12 - 6, "two sets of the teacher's and one of the student's, of four batches each"
    first = (tmp_path / "eval.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "recipe.yaml"]
    assert run("eval", *arguments_of("eval", judged, tmp_path), "--seed", 1) == 0
    assert (tmp_path / "eval.json").read_bytes() != first
