"""The command line: what it writes, and that a mistake is one line, exit status 2, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Capture, refused, run
from PIL import Image
from safetensors.torch import load_file
from tiny import distill_recipe, make_teacher, save_tiny, write_yaml

from ddecode.checkpoint import ModelFolder
from ddecode.cli import VERBS
from ddecode.pipeline import DistilledPipeline
from ddecode.randomness import sample_generators


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
    assert facts["model_hash"] == ModelFolder.open(model).model_hash()
    assert all(row["plan"] in capsys.readouterr().out for row in facts["rows"][:1])


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


def test_the_script_in_a_process_of_its_own_prints_one_line(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from ddecode.cli import main; sys.exit(main())",
         "sample", "no-such-model", "--out", "x.png"],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": root, "PATH": "/usr/bin"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
