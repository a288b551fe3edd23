"""Reporters: they show what the log holds, also of a run that was stopped, and a missing one is refused at once."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import Capture, refused
from PIL import Image
from tiny import distill_recipe, make_pipeline, save_tiny, write_yaml
from torch import Tensor
from toy_training import CONFIG, Points, Toy, killed_at

from ddecode.config import as_dict, build
from ddecode.reporters import GROUPS, curves, grouped
from ddecode.training import Shown, train
from ddecode.training_config import TrainingConfig


class Positional(Toy):
    """With a metric by position."""

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().forward(*args, **options)
        return loss, metrics | {"error_K": metrics["error"] * torch.arange(16)}


def picture(step: int) -> Image.Image:
    return Image.fromarray(np.full((2, 3, 3), 10 * step, np.uint8))


def run(folder: Path, *names: str, samples: Points | None = None, resume: bool = False) -> None:
    config = build(TrainingConfig, as_dict(CONFIG) | {"report_to": names, "preview_every": 4}, "training")
    train(
        Positional(), samples or Points(), config, folder,
        identity={"teacher": "t", "stages": {"training": as_dict(config)}}, resume=resume, show_progress=False,
        preview=lambda model, step: Shown(metrics={"measured": step / 2}, pictures={"preview": picture(step)}),
    )  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stopped_and_resumed(folder: Path, *names: str) -> None:
    """After step 4 of 9; checkpoints are at 3 and 6."""
    with pytest.raises(KeyboardInterrupt):
        run(folder, *names, samples=killed_at(4))
    run(folder, *names, resume=True)


def test_lists_become_the_means_of_their_eighths() -> None:
    assert curves({"a": 1.0, "b": None, "c": [1.0, 3.0], "d": 2}) == {"a": 1.0, "c/1of2": 1.0, "c/2of2": 3.0, "d": 2.0}
    assert curves({"e": list(range(16))}) == {f"e/{i + 1}of8": 2 * i + 0.5 for i in range(8)}
    assert len(grouped([0.0] * 13)) == GROUPS and grouped([3.5]) == [3.5]


# --- TensorBoard ----------------------------------------------------------------------------------------------


def tensorboard_of(folder: Path) -> tuple[dict[str, dict[int, float]], dict[int, np.ndarray]]:
    """Scalars by name and step, and the pictures by step."""
    import io

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == len(set(steps)), f"{name} has a step twice"
    scalars = {n: {event.step: event.value for event in events.Scalars(n)} for n in events.Tags()["scalars"]}
    shown = events.Images("preview")
    return scalars, {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in shown}


@pytest.mark.parametrize("go", [run, stopped_and_resumed])
def test_tensorboard_shows_the_log(go: Any, tmp_path: Path) -> None:
    go(tmp_path, "tensorboard")
    scalars, pictures = tensorboard_of(tmp_path)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 10))
    for row in rows:
        for name, value in curves({k: v for k, v in row.items() if k != "step"}).items():
            assert scalars[name].pop(row["step"]) == pytest.approx(value, rel=1e-6)
    assert not any(scalars.values()), "nothing but the log"
    assert {"loss", "measured", "error_K/1of8", "error_K/8of8", "lr", "grad_norm"} <= set(scalars)
    assert sorted(pictures) == [4, 8] and all(np.array_equal(pictures[n], np.asarray(picture(n))) for n in (4, 8))


def test_a_run_that_is_done_is_not_opened_again(tmp_path: Path) -> None:
    run(tmp_path, "tensorboard")
    before = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    run(tmp_path, "tensorboard", resume=True)
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == before


def test_a_reporter_may_join_a_run_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, samples=killed_at(4))
    run(tmp_path, "tensorboard", resume=True)
    assert sorted(tensorboard_of(tmp_path)[0]["loss"]) == list(range(4, 10))


# --- W&B ------------------------------------------------------------------------------------------------------


class FakeWandb(SimpleNamespace):
    """Keeps runs by id as W&B does: steps only rise, earlier ones are ignored."""

    Error = type("Error", (Exception,), {})

    def __init__(self) -> None:
        super().__init__(runs={}, opened=[], exits=[], Image=lambda picture: picture)

    def init(self, **options: Any) -> Any:
        self.opened.append(options)
        steps = self.runs.setdefault(options["id"], {})

        def log(values: dict[str, Any], step: int) -> None:
            if not steps or step > max(steps):
                steps[step] = values

        return SimpleNamespace(log=log, finish=lambda exit_code: self.exits.append(exit_code))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_shows_the_log_in_one_run(wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    stopped_and_resumed(tmp_path, "wandb")
    (first, second), ((name, steps),) = wandb.opened, wandb.runs.items()
    assert first == second and (first["project"], first["resume"], first["dir"]) == ("ddecode", "allow", str(tmp_path))
    assert first["config"]["teacher"] == "t" and name == (tmp_path / "wandb.id").read_text() != ""
    assert wandb.exits == [1, 0], "stopped, then finished"
    for row in rows_of(tmp_path):
        shown = steps[row.pop("step")]
        expected = curves({k: v for k, v in row.items() if k != "seconds"})
        assert {k: v for k, v in shown.items() if k in expected} == pytest.approx(expected)
    assert [n for n, shown in steps.items() if "preview" in shown] == [4, 8] and steps[4]["preview"] == picture(4)


def test_a_run_that_begins_anew_is_a_new_one_of_wandb(wandb: FakeWandb, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "wandb", samples=killed_at(1))
    assert len(wandb.runs) == 2


def test_what_wandb_refuses_is_one_sentence(wandb: FakeWandb, tmp_path: Path) -> None:
    def refuse(**options: Any) -> None:
        raise wandb.Error("no API key: run wandb login")

    wandb.init = refuse
    with pytest.raises(ValueError, match=r"training\.report_to: wandb: no API key"):
        run(tmp_path, "wandb")


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("stage", ["training", "objective.score.tuning"])
def test_a_missing_library_is_refused_before_anything_is_done(
    name: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    recipe = distill_recipe(save_tiny(tmp_path / "model", make_pipeline()))
    recipe["objective"]["score"] = {"weight": 1.0, "tuning": {"steps": 1, "batch": 1, "lr": 1.0}}
    path = write_yaml(tmp_path / "recipe.yaml", recipe)
    out = ["--pairs", tmp_path / "none", "--out", tmp_path / "run", f"{stage}.report_to=[{name}]"]
    message = refused(capsys, "distill", "--config", path, *out)
    assert f"training.report_to: {name} is not installed" in message and message.endswith(f"pip install {name}")
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="wandb is not installed"):
        run(tmp_path / "run", "wandb")
    sys.modules.pop("wandb")


def test_names_are_checked() -> None:
    for names, message in (
        (["mlflow"], r"report_to\[0\] must be one of tensorboard, wandb, got 'mlflow'"),
        (["wandb", "wandb"], "names one twice"),
        ("wandb", "must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            build(TrainingConfig, as_dict(CONFIG) | {"report_to": names}, "training")
