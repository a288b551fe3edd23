"""The command line: what it writes, and that a mistake is one line, exit status 2, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Capture, refused, run
from PIL import Image
from safetensors.torch import load_file
from tiny import distill_recipe, make_teacher, make_var_teacher, save_tiny, tree_of, write_yaml

from ddecode import distillation
from ddecode import pairs as pairs_module
from ddecode.checkpoint import ModelFolder
from ddecode.cli import VERBS
from ddecode.evaluation.features import FeatureNetwork
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


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help(verb: str | None, capsys: Capture) -> None:
    assert run(*([verb] if verb else []), "--help") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: ddecode") and captured.err == ""
    if verb is None:
        assert all(name in captured.out for name in VERBS)
    else:
        assert "--debug" in captured.out


# --- sample and info ------------------------------------------------------------------------------------------


def test_sample_writes_a_grid(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "folder" / "grid.png"
    assert run("sample", model, "--num", 5, "--out", out) == 0
    picture = Image.open(out)
    assert picture.mode == "RGB" and picture.width * 2 == picture.height * 3, "5 images in 3 columns"
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"]
    assert str(out) in capsys.readouterr().out


def test_sample_writes_arrays(model: Path, tmp_path: Path) -> None:
    assert run("sample", model, "--num", 6, "--seed", 4, "--steps", 2, "--out", tmp_path / "x.npz") == 0
    arrays = np.load(tmp_path / "x.npz")
    assert sorted(arrays.files) == ["arr_0", "arr_1", "labels"]
    assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (6, 8, 8, 3)
    assert arrays["labels"].tolist() == [0, 1, 2, 3, 0, 1], "balanced without --classes"
    pipe = DistilledPipeline.from_pretrained(model)
    expected = pipe(
        [0, 1, 2, 3, 0, 1], num_inference_steps=2, generator=sample_generators(4, range(6)), output_type="np"
    )
    np.testing.assert_array_equal(arrays["arr_0"], expected.images)


def test_sample_writes_a_folder_of_the_same_images(model: Path, tmp_path: Path) -> None:
    options = ["--num", 12, "--classes", "2,0", "--seed", 1]
    assert run("sample", model, *options, "--out", tmp_path / "images") == 0
    assert run("sample", model, *options, "--out", tmp_path / "images.npz") == 0
    arrays = np.load(tmp_path / "images.npz")
    files = sorted((tmp_path / "images").iterdir())
    assert arrays["labels"].tolist() == [2, 0] * 6
    assert [f.name for f in files] == [f"{i:06d}-class{label}.png" for i, label in enumerate(arrays["labels"])]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(f)) for f in files]), arrays["arr_0"])


@pytest.mark.parametrize(
    "how", [["--steps", "1"], ["--steps", "teacher"], ["--plan", "student:0-4,teacher:4-8,student:4-16"]]
)
def test_image_i_depends_on_seed_and_i_alone(how: list[str], model: Path, tmp_path: Path) -> None:
    arrays = []
    for batch, num in ((1, 5), (2, 5), (64, 7)):
        out = tmp_path / f"{batch}.npz"
        assert run("sample", model, *how, "--num", num, "--batch", batch, "--seed", 9, "--out", out) == 0
        arrays.append(np.load(out)["arr_0"][:5].astype(int))
    assert abs(arrays[0] - arrays[1]).max() <= 1 and abs(arrays[0] - arrays[2]).max() <= 1
    assert len({image.tobytes() for image in arrays[0]}) == 5
    assert run("sample", model, *how, "--num", 5, "--seed", 10, "--out", tmp_path / "other.npz") == 0
    assert (np.load(tmp_path / "other.npz")["arr_0"] != arrays[0]).any(axis=(1, 2, 3)).all()


def test_info_says_what_a_model_is(model: Path, capsys: Capture) -> None:
    assert run("info", model) == 0
    text = capsys.readouterr().out
    for word in ("tiny", "llamagen", "teacher", "student", "starts: [0, 4]", "guidance_scale"):
        assert word in text
    assert run("info", model, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["tokens"], facts["codes"], facts["num_classes"]) == (16, 32, 4)
    assert facts["teacher_hash"] == ModelFolder.open(model).teacher_hash()
    stored = load_file(model / "model.safetensors")
    for part in ("tokenizer", "teacher", "student"):
        assert facts[part]["parameters"] == sum(t.numel() for n, t in stored.items() if n.startswith(part))


def test_eval_prints_a_table_and_writes_json(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "eval.json"
    plan = "student:0-4,teacher:4-16"
    assert run("eval", model, "--steps", "teacher,1", "--plan", plan, "--num", 16, "--json", out) == 0
    facts = json.loads(out.read_text())
    assert [row["plan"] for row in facts["rows"]] == ["teacher", "control", "1", plan]
    assert (facts["protocol"], facts["num"], facts["model"]) == ("zoo", 16, "tiny")
    assert all(row["plan"] in capsys.readouterr().out for row in facts["rows"][:1])


# --- pairs and distill ----------------------------------------------------------------------------------------


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


def test_a_teacher_from_captions_is_described_and_sent_to_python(tmp_path: Path, capsys: Capture) -> None:
    teacher = make_teacher(num_classes=0, caption_width=12, caption_length=5)
    model = save_tiny(tmp_path / "captions", DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher))
    assert run("info", model) == 0
    for verb, *options in (("sample", "--steps", "teacher", "--out", tmp_path / "x.png"), ("eval",), ("bench",)):
        assert "captions, not class labels" in refused(capsys, verb, model, *options)
    recipe = write_yaml(tmp_path / "recipe.yaml", distill_recipe(model))
    assert "students are defined for class labels" in refused(
        capsys, "pairs", "--config", recipe, "--out", tmp_path / "pairs"
    )
    assert not (tmp_path / "pairs").exists()


def test_a_stopped_distillation_resumes_to_the_same_student(
    recipe: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def distill(out: Path, *options: str) -> int:
        return run("distill", "--config", recipe, "--pairs", pairs, "--out", out, *options)

    assert distill(tmp_path / "whole") == 0
    calls: list[Any] = []
    batch = Pairs.batch

    def killed(self: Pairs, indices: list[int]) -> Any:
        calls.append(indices)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return batch(self, indices)

    monkeypatch.setattr(Pairs, "batch", killed)
    assert distill(tmp_path / "parts") == 130
    assert "ddecode distill: stopped" in capsys.readouterr().err.splitlines(), "on a line of its own, behind the bar"
    assert not (tmp_path / "parts" / "model").exists()
    monkeypatch.setattr(Pairs, "batch", batch)

    before = tree_of(tmp_path / "parts")
    assert "--resume" in refused(capsys, "distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "parts")
    assert "another config" in refused(
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


def test_a_student_may_have_fewer_layers_and_image_terms(
    recipe: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = FeatureNetwork(widths=(4, 8)).eval().requires_grad_(False)  # the bundled one is for larger images
    monkeypatch.setattr(distillation, "load_features", lambda folder: network)
    overrides = ["student.depth=1", "objective.energy=0.5", "objective.perceptual=0.1", "training.steps=2"]
    assert run("distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "run", *overrides) == 0
    assert len(DistilledPipeline.from_pretrained(tmp_path / "run" / "model").student.backbone.layers) == 1
    assert "energy" in (tmp_path / "run" / "log.jsonl").read_text()


# --- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "1 to 2 steps"),
        (["--steps", "0"], "got '0'"),
        (["--steps", "two"], "got 'two'"),
        (["--steps", "1", "--plan", "student:0-16"], "not both"),
        (["--plan", "student:0-8"], "ends at 8"),
        (["--plan", "student:0-16,student:5-16"], "knows [0, 4]"),
        (["--plan", "oracle:0-16"], "no model 'oracle'"),
        (["--plan", ""], "who:start-stop"),
        (["--classes", "0,4"], "class 4 is out of range: this model knows 0..3"),
        (["--classes", "-1"], "--classes"),
        (["--classes", "shoe"], "got 'shoe'"),
        (["--classes", ""], "--classes"),
        (["--num", "0"], "at least 1"),
        (["--num", "many"], "no whole number"),
        (["--batch", "0"], "at least 1"),
        (["--seed", "-3"], "at least 0"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=str,
)
def test_sample_refuses(arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert message in refused(capsys, "sample", model, "--out", tmp_path / "new" / "x.png", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["x.jpg", "x.png.gz", "there.png", "there", "file", "file/x.png", "file/images"])
def test_sample_refuses_an_out_it_cannot_write(
    out: str, model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "there.png").mkdir()
    (tmp_path / "there").write_text("mine")
    before = sorted(tmp_path.rglob("*"))

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("refused only after the work")

    monkeypatch.setattr(DistilledPipeline, "emit", never)
    assert out.split("/")[0] in refused(capsys, "sample", model, "--out", tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "verb", [["sample", "--out", "x.png"], ["info"], ["eval"], ["bench"]], ids=lambda verb: verb[0]
)
def test_an_unknown_model_is_refused(
    verb: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "unknown model 'no-such-model'" in refused(capsys, verb[0], "no-such-model", *verb[1:])
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_refused(model: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    weights = (model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for verb in (["info"], ["sample", "--out", tmp_path / "x.png"]):
        assert "model.safetensors is damaged" in refused(capsys, verb[0], tmp_path, *verb[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_eval_refuses(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "at least 8" in refused(capsys, "eval", model, "--num", 7, "--json", tmp_path / "a" / "x.json")
    assert "got 'x'" in refused(capsys, "eval", model, "--steps", "x")
    assert "1 to 2 steps" in refused(capsys, "eval", model, "--steps", "5")
    assert "--inception" in refused(capsys, "eval", model, "--protocol", "adm")
    assert list(tmp_path.iterdir()) == []


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


def test_arguments_that_are_missing_are_named(capsys: Capture) -> None:
    assert "VERB" in refused(capsys)
    assert "invalid choice: 'smaple'" in refused(capsys, "smaple")
    assert "--out" in refused(capsys, "sample", "fashion-llamagen")
    assert "--pairs" in refused(capsys, "distill", "--config", "x", "--out", "y")
    assert "--config" in refused(capsys, "pairs", "--out", "y")


def test_debug_shows_the_traceback(capsys: Capture) -> None:
    assert run("info", "no-such-model", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("ddecode info: error: unknown model")


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


def test_pairs_and_cli_share_their_seeds(recipe: Path, pairs: Path, model: Path) -> None:
    """Sample i of a set with seed s has the same noise whichever verb draws it."""
    noise, _, _ = Pairs(pairs).batch([0, 19])
    for row, i in zip(noise, (0, 19), strict=True):
        assert torch.equal(row, torch.randn(16, 8, generator=sample_generators(3, [i])[0]))
    assert pairs_module.noise_of([1], (2, 2)).shape == (1, 2, 2)


def test_the_script_in_a_process_of_its_own_prints_one_line(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from ddecode.cli import main; sys.exit(main())",
         "sample", "no-such-model", "--out", "x.png"],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": root, "PATH": "/usr/bin"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
