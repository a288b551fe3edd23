"""What pairs and training will cost: the figures are those of the real run."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import Capture, refused, run
from tiny import distill_recipe, make_pipeline, make_teacher, save_tiny, write_yaml

from ddecode import forecast as forecast_module
from ddecode.config import DistillConfig, PairsConfig, read_config
from ddecode.distillation import distill
from ddecode.forecast import Trial, bytes_below, forecast, forecast_training
from ddecode.pairs import make_manifest, write_pairs


def test_disk_is_what_the_shards_take(tmp_path: Path) -> None:
    teacher = make_teacher()
    manifest = make_manifest(teacher, "toy", "hash", PairsConfig(num=40, shard_size=16, batch=8))
    told = forecast(teacher, manifest)
    write_pairs(teacher, manifest, tmp_path, show_progress=False)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    headers = 3 * 512
    assert told.disk_bytes <= written <= told.disk_bytes + headers
    assert told.pairs == 40 and told.measured_batch == told.batch == 8 and told.device == "cpu"


def test_time_and_memory_are_extrapolated_from_the_largest_batch_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher()
    manifest = make_manifest(teacher, "toy", "hash", PairsConfig(num=1000, batch=256))
    ran: list[int] = []

    def timed(teacher: object, manifest: object, batch: int) -> float:
        ran.append(batch)
        return 0.5 * batch

    monkeypatch.setattr(forecast_module, "run", timed)
    monkeypatch.setattr(forecast_module, "peak_bytes", lambda device: 1000 + 10 * ran[-1])
    told = forecast(teacher, manifest, patience_s=20.0)
    assert ran == [1, 1, 4, 16], "it stops once a batch takes a quarter of the patience"
    assert told.seconds == pytest.approx(500.0) and told.memory_bytes == 1000 + 10 * 256
    assert "extrapolated to the recipe's 256" in str(told)
    assert "extrapolated" not in str(dataclasses.replace(told, batch=16))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """With pairs and both of DD2's stages, whose images and second network take part."""
    model = save_tiny(tmp_path / "model", make_pipeline())
    path = write_yaml(tmp_path / "recipe.yaml", distill_recipe(model))
    assert run("pairs", "--config", path, "--out", tmp_path / "pairs") == 0
    return path


SCORE = (
    "objective.score.weight=1.0", "objective.score.updates=2", "objective.image_batch=2",
    "objective.score.tuning={steps: 9, batch: 6, lr: 1.0e-3}",
)  # fmt: skip


@pytest.mark.parametrize("overrides", [(), SCORE], ids=["regression", "score"])
def test_a_training_takes_what_the_real_one_does(overrides: tuple[str, ...], recipe: Path, tmp_path: Path) -> None:
    config = read_config(recipe, DistillConfig, (*overrides, "training.steps=8", "training.batch=6"))
    told = forecast_training(config, tmp_path / "pairs")
    distill(config, tmp_path / "pairs", tmp_path / "run", show_progress=False)
    kept = [bytes_below(tmp_path / "run" / each) for each in ("checkpoint", "tuning/checkpoint", "model")]
    disk = 2 * kept[0] + 2 * kept[1] + kept[2]
    assert told.disk_bytes == pytest.approx(disk, rel=0.01)
    assert (told.steps, told.batch, told.measured_batch, told.device) == (8, 6, 6, "cpu")
    assert told.seconds > 0 and (told.tuning_seconds > 0) == bool(overrides) and told.memory_bytes > 2**20


def test_a_training_is_measured_by_one_process(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "launch", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="--dry-run measures one process: run it without a launcher"):
        forecast_training(read_config(recipe, DistillConfig), Path("pairs"))


def test_a_trainings_cost_is_extrapolated_from_the_largest_batch_that_is_quick(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def trial(config: DistillConfig, pairs: Path, batch: int) -> Trial:
        tried.append(batch)
        return Trial(
            batch=batch, seconds=0.5 * batch, tuning_seconds=0.25 * batch, memory_bytes=1000 + 10 * batch, disk_bytes=7
        )

    monkeypatch.setattr(forecast_module, "trial", trial)
    overrides = (*SCORE, "training.steps=100", "training.batch=64", "objective.cache_gib=1")
    told = forecast_training(read_config(recipe, DistillConfig, overrides), Path(), patience_s=40.0)
    assert tried == [4, 10] and told.measured_batch == 10, "5 of the 40 seconds a step"
    assert told.seconds == pytest.approx(100 * 64 / 2) and told.tuning_seconds == pytest.approx(9 * 6 / 4)
    assert told.memory_bytes == 1000 + 10 * 64 + 2**30 and told.disk_bytes == 7
    assert "extrapolated to the recipe's 64" in str(told) and "of the first stage" in str(told)
    tried.clear()
    assert forecast_training(read_config(recipe, DistillConfig, overrides), Path(), patience_s=1.0).measured_batch == 4
    assert tried == [4], "a larger one would take too long"


def test_distill_tells_the_cost_and_leaves_nothing(
    recipe: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    command = ("distill", "--config", recipe, "--pairs", tmp_path / "pairs")
    assert "give --out FOLDER for the run, or --dry-run" in refused(capsys, *command)
    capsys.readouterr()
    assert run(*command, "--dry-run") == 0
    assert "s a step)" in capsys.readouterr().out and not list((tmp_path / "empty").iterdir())
