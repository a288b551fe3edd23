"""`ddecode pairs` and `ddecode distill`: from a recipe to a student, stopped and gone on with, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from command import Capture, refused, run
from interruption import interrupted
from safetensors.torch import load_file
from tiny import distill_recipe, make_var_teacher, save_tiny, tree_of, write_yaml

from ddecode import pairs as pairs_module
from ddecode.checkpoint import ModelFolder
from ddecode.evaluation.features import FeatureNetwork, save_features
from ddecode.pairs import Pairs
from ddecode.pipeline import DistilledPipeline
from ddecode.randomness import sample_generators


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "recipe.yaml", distill_recipe(model))


@pytest.fixture
def pairs(recipe: Path, tmp_path: Path) -> Path:
    assert run("pairs", "--config", recipe, "--out", tmp_path / "pairs") == 0
    return tmp_path / "pairs"


def test_pairs_go_on_and_grow(recipe: Path, pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    before = tree_of(pairs)
    assert len(Pairs(pairs)) == 20 and len(before) == 1 + 3
    (pairs / "shard-00001.safetensors").unlink()
    capsys.readouterr()
    assert run("pairs", "--config", recipe, "--out", pairs) == 0
    assert "8 made now" in capsys.readouterr().out
    assert tree_of(pairs) == before
    assert run("pairs", "--config", recipe, "--num", 30, "--out", pairs) == 0
    assert run("pairs", "--config", recipe, "--out", tmp_path / "direct", "pairs.num=30") == 0
    assert tree_of(pairs) == tree_of(tmp_path / "direct")


def test_overrides_may_stand_between_options(recipe: Path, tmp_path: Path) -> None:
    assert run("pairs", "--config", recipe, "pairs.num=3", "pairs.seed=8", "--out", tmp_path / "p") == 0
    manifest = Pairs(tmp_path / "p").manifest
    assert (manifest.num, manifest.seed) == (3, 8)


def test_a_student_from_pairs_to_images(
    recipe: Path, pairs: Path, tmp_path: Path, model: Path, capsys: Capture
) -> None:
    assert run("distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "run") == 0
    assert f"student -> {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "cross_entropy", "accuracy", "lr"} <= set(rows[0])
    assert sorted(p.name for p in (tmp_path / "run" / "previews").iterdir()) == ["0000003.png", "0000006.png"]

    result = tmp_path / "run" / "model"
    assert ModelFolder.open(result).teacher_hash() == ModelFolder.open(model).teacher_hash()
    old, new = load_file(model / "model.safetensors"), load_file(result / "model.safetensors")
    assert set(old) == set(new)
    assert all(torch.equal(old[n], new[n]) for n in old if not n.startswith("student."))
    group = ModelFolder.open(result).config["student"]
    assert (group["starts"], group["split"]) == ([0, 4], 10)
    average = load_file(tmp_path / "run" / "checkpoint" / "ema.safetensors")
    assert all(torch.equal(new[f"student.{name}"], tensor) for name, tensor in average.items())
    assert run("sample", result, "--steps", 2, "--num", 4, "--out", tmp_path / "x.npz") == 0
    assert run("info", result) == 0


def test_a_var_teacher_goes_the_whole_way(tmp_path: Path, capsys: Capture) -> None:
    """From pairs to a student of half the layers, to pictures, and out in the published layout."""
    teacher = make_var_teacher()
    model = save_tiny(tmp_path / "var", DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher))
    recipe = write_yaml(tmp_path / "var.yaml", distill_recipe(model) | {"student": {"starts": [0, 5], "depth": 1}})
    assert run("pairs", "--config", recipe, "--dry-run") == 0
    assert "20 pairs on one cpu" in capsys.readouterr().out and not (tmp_path / "pairs").exists()
    assert "--out" in refused(capsys, "pairs", "--config", recipe)
    assert run("pairs", "--config", recipe, "--out", tmp_path / "pairs") == 0
    assert run("distill", "--config", recipe, "--pairs", tmp_path / "pairs", "--out", tmp_path / "run") == 0
    result = tmp_path / "run" / "model"
    student = ModelFolder.open(result).student()
    assert (student.backbone.depth, student.starts, student.split) == (1, (0, 5), 14)
    for how in (["--steps", 2], ["--plan", "student:0-14,teacher:1-5,student:5-14"], ["--steps", "teacher"]):
        assert run("sample", result, *how, "--num", 4, "--out", tmp_path / "x.npz") == 0
    assert "no step boundary" in refused(
        capsys, "sample", result, "--plan", "student:0-14,teacher:3-14", "--out", tmp_path / "y.npz"
    )
    assert run("convert", result, "--family", "dd1-var", "--out", tmp_path / "published") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "published" / "model.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "dd1-var"


def test_a_stopped_distillation_resumes_to_the_same_student(
    recipe: Path, pairs: Path, tmp_path: Path, capsys: Capture
) -> None:
    def distill(out: Path, *options: str) -> int:
        return run("distill", "--config", recipe, "--pairs", pairs, "--out", out, *options)

    assert distill(tmp_path / "whole") == 0
    with interrupted(Pairs, "batch", at=4):
        assert distill(tmp_path / "parts") == 130
    assert "ddecode distill: stopped" in capsys.readouterr().err.splitlines(), "on a line of its own, behind the bar"
    assert not (tmp_path / "parts" / "model").exists()

    before = tree_of(tmp_path / "parts")
    assert "--resume" in refused(capsys, "distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "parts")
    assert "another config: config.training.lr (0.001, not 0.1); choose" in refused(
        capsys,
        "distill",
        "--config",
        recipe,
        "--pairs",
        pairs,
        "--out",
        tmp_path / "parts",
        "--resume",
        "training.lr=0.1",
    )
    assert tree_of(tmp_path / "parts") == before
    assert distill(tmp_path / "parts", "--resume") == 0
    assert tree_of(tmp_path / "parts" / "model") == tree_of(tmp_path / "whole" / "model")


def test_a_stopped_distillation_goes_on_with_its_own_pairs_where_more_were_made(
    recipe: Path, model: Path, tmp_path: Path
) -> None:
    def distill(out: Path, *options: str) -> int:
        return run("distill", "--config", recipe, "--pairs", tmp_path / "pairs", "--out", out, *options)

    def make(num: int) -> int:
        return run("pairs", "--config", recipe, "--out", tmp_path / "pairs", "--num", num)

    assert make(20) == 0 and distill(tmp_path / "whole") == 0
    with interrupted(Pairs, "batch", at=4):
        assert distill(tmp_path / "parts") == 130
    assert make(33) == 0 and len(Pairs(tmp_path / "pairs")) == 33
    last = sorted((tmp_path / "pairs").glob("shard-*"))[-1]
    last.rename(tmp_path / "aside")  # those to come need not be there
    assert distill(tmp_path / "parts", "--resume") == 0
    assert tree_of(tmp_path / "parts" / "model") == tree_of(tmp_path / "whole" / "model")
    (tmp_path / "aside").rename(last)
    assert distill(tmp_path / "new") == 0
    assert "num: 33" in (tmp_path / "new" / "model" / "recipe.yaml").read_text()


def test_a_student_may_have_fewer_layers_and_image_terms(recipe: Path, pairs: Path, tmp_path: Path) -> None:
    save_features(tmp_path / "features", FeatureNetwork(widths=(4, 8)))  # the bundled one is for larger images
    overrides = ["student.depth=1", "objective.energy=0.5", "objective.perceptual=0.1", "training.steps=2"]
    overrides.append(f"objective.features={tmp_path / 'features'}")
    assert run("distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "run", *overrides) == 0
    assert len(DistilledPipeline.from_pretrained(tmp_path / "run" / "model").student.backbone.layers) == 1
    assert "energy" in (tmp_path / "run" / "log.jsonl").read_text()


def test_pairs_and_cli_share_their_seeds(recipe: Path, pairs: Path, model: Path) -> None:
    """Sample i of a set with seed s has the same noise whichever verb draws it."""
    noise, _, _ = Pairs(pairs).batch([0, 19])
    for row, i in zip(noise, (0, 19), strict=True):
        assert torch.equal(row, torch.randn(16, 8, generator=sample_generators(3, [i])[0]))
    assert pairs_module.noise_of([1], (2, 2)).shape == (1, 2, 2)


def test_a_full_disk_leaves_no_torn_file(
    model: Path, recipe: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert run("sample", model, "--num", 1, "--out", tmp_path / "x.png") == 2
    assert f"No space left on device: '{tmp_path}/x.png'; make room and run it again" in capsys.readouterr().err
    assert run("pairs", "--config", recipe, "--out", tmp_path / "pairs") == 2
    assert list(tree_of(tmp_path)) == ["recipe.yaml"]


# --- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.nun=4", "did you mean pairs.num?"),
        ("pairs.num=0", "pairs.num must be at least 1"),
        ("teacher=no-such-model", "unknown model 'no-such-model'"),
        ("pairs.recipe.top_k=-1", "top_k must be at least 0"),
        ("nonsense", "key.path=value"),
    ],
)
def test_pairs_refuses(override: str, message: str, recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    before = tree_of(tmp_path)
    assert message in refused(capsys, "pairs", "--config", recipe, "--out", tmp_path / "new", override)
    assert tree_of(tmp_path) == before and not (tmp_path / "new").exists()


def test_pairs_refuses_a_folder_of_other_pairs_or_with_damage(
    recipe: Path, pairs: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = tree_of(tmp_path)
    assert "another seed" in refused(capsys, "pairs", "--config", recipe, "--out", pairs, "pairs.seed=4")
    assert tree_of(tmp_path) == before
    assert "recipe.yaml" in refused(capsys, "pairs", "--config", recipe, "--out", recipe)
    path = pairs / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert path.name in refused(capsys, "pairs", "--config", recipe, "--out", pairs)
    assert "no config file" in refused(capsys, "pairs", "--config", tmp_path / "none.yaml", "--out", tmp_path / "new")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=4", "did you mean training.steps?"),
        ("training.precision=fp8", "one of no, bf16"),
        ("student.starts=[0, 16]", "starts must lie in 0..15"),
        ("student.split=17", "split must lie in 0..16"),
        ("student.depth=3", "3 layers cannot be cut from a teacher of 2"),
        ("objective={energy: 1}", "fashion-perceptual tells 10 classes of small images apart, and the teacher has 4"),
    ],
)
def test_distill_refuses(
    override: str, message: str, recipe: Path, pairs: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "run", override]
    assert message in refused(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_distill_refuses_an_unknown_feature_network(recipe: Path, pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "run"]
    assert "nowhere" in refused(capsys, *arguments, "objective.features=nowhere", "objective.energy=1")
    assert not (tmp_path / "run").exists()


def test_distill_refuses_missing_and_damaged_pairs(recipe: Path, pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    def refusal(folder: Path) -> str:
        return refused(capsys, "distill", "--config", recipe, "--pairs", folder, "--out", tmp_path / "run")

    assert "holds no pairs" in refusal(tmp_path / "none")
    shard = pairs / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"{shard.name} is damaged" in refusal(pairs)
    shard.unlink()
    assert f"{shard.name} is missing" in refusal(pairs)
    assert not (tmp_path / "run").exists()


def test_distill_refuses_pairs_of_another_teacher(recipe: Path, pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    manifest = json.loads((pairs / "manifest.json").read_text())
    (pairs / "manifest.json").write_text(json.dumps(manifest | {"teacher_hash": "0000"}))
    message = refused(capsys, "distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "run")
    assert "another teacher" in message and not (tmp_path / "run").exists()
