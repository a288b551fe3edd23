"""Model cards: what the hub and people read of a model, and what a card refuses to leave out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Capture, refused, run
from tiny import distill_recipe, tree_of, write_yaml

from ddecode import DistilledPipeline
from ddecode.card import Card, write_card
from ddecode.checkpoint import ModelFolder
from ddecode.cli import card as card_verb
from ddecode.config import DistillConfig, as_yaml, read_config

RESULT = {
    "protocol": "zoo", "model": "run", "num": 500, "seed": 3, "labels": "balanced", "rounding": "nearest",
    "feature_hash": "f00d", "reference_hash": "beef", "versions": {"ddecode": "0.1.0"},
    "rows": [
        {"plan": "teacher", "network_evaluations": 16, "frechet": 0.5, "ratio": None},
        {"plan": "1", "network_evaluations": 1, "frechet": 0.75, "ratio": None},
    ],
}  # fmt: skip


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "mine")


def card(**options: Any) -> Card:
    return Card(**{"license": "mit", "teacher": "someone/teacher", "teacher_license": "cc-by-nc-4.0"} | options)


def read(path: Path) -> tuple[dict[str, Any], str]:
    _, matter, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(matter), body


def test_a_card_says_what_the_folder_and_its_maker_know(folder: Path, tmp_path: Path) -> None:
    recipe, metrics = tmp_path / "recipe.yaml", tmp_path / "metrics.json"
    recipe.write_text("teacher: someone/teacher\n")
    metrics.write_text(json.dumps(RESULT))
    path = write_card(folder, card(recipe=recipe, metrics=metrics, datasets=("a/set",)), model="me/mine")
    matter, body = read(path)
    assert path == folder / "README.md"
    assert {key: matter[key] for key in matter if key != "tags"} == {
        "license": "mit",
        "library_name": "ddecode",
        "pipeline_tag": "unconditional-image-generation",
        "datasets": ["a/set"],
        "base_model": "someone/teacher",
    }
    assert {"ddecode", "llamagen"} <= set(matter["tags"])
    assert body.strip().startswith("# mine\n")
    assert "samples in 1 to 2 steps" in body and "someone/teacher. Its licence: cc-by-nc-4.0" in body
    assert "```yaml\nteacher: someone/teacher\n```" in body
    assert "Protocol `zoo`, n 500, seed 3, labels balanced; model `run`, features `f00d`, reference `beef`" in body
    assert "| plan | network_evaluations | frechet |" in body and "| 1 | 1 | 0.75 |" in body
    assert (folder / "recipe.yaml").read_text() == recipe.read_text()
    assert sorted(tree_of(folder)) == ["README.md", "config.json", "model.safetensors", "recipe.yaml"]


def test_a_card_says_where_figures_are_of_other_weights(folder: Path, tmp_path: Path) -> None:
    metrics, own = tmp_path / "metrics.json", ModelFolder.open(folder).model_hash()
    for known, told in ((own, False), ("0123", True)):
        metrics.write_text(json.dumps(RESULT | {"model_hash": known}))
        body = read(write_card(folder, card(metrics=metrics), model="me/mine"))[1]
        assert (f"Measured on weights `0123`; those of this folder are `{own}`." in body) == told


def test_the_cards_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = read(write_card(folder, card(), model=folder.name))[1]
    monkeypatch.chdir(folder.parent)
    exec(body.split("```python\n")[1].split("```")[0], {"__name__": "card"})
    assert (folder.parent / "sample.png").is_file()


def test_what_is_unknown_is_said_to_be(folder: Path) -> None:
    matter, body = read(write_card(folder, card(teacher="a teacher of our own"), model="mine"))
    assert "base_model" not in matter and "datasets" not in matter
    assert "Not recorded." in body and "Not measured yet." in body
    (folder / "recipe.yaml").write_text("its: own")
    assert "its: own" in read(write_card(folder, card(), model="mine"))[1]


def test_a_model_without_a_student_shows_its_teacher(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["student"]
    (folder / "config.json").write_text(json.dumps(config))
    body = read(write_card(folder, card(), model="mine"))[1]
    assert "no student" in body and 'num_inference_steps="teacher"' in body


@pytest.mark.parametrize("name", ["license", "teacher", "teacher_license"])
def test_a_card_without_licences_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"the card needs {name}:"):
        card(**{name: " "})


@pytest.mark.parametrize("name", ["recipe", "metrics"])
def test_a_card_of_missing_files_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}: there is no file"):
        card(**{name: tmp_path / "nowhere"})


def test_nothing_is_written_of_a_damaged_result(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    before = tree_of(folder)
    with pytest.raises(ValueError, match="no result of ddecode eval"):
        write_card(folder, card(metrics=tmp_path / "metrics.json"), model="mine")
    assert tree_of(folder) == before


# --- the command line -----------------------------------------------------------------------------------------

LICENCES = ["--license", "mit", "--teacher", "someone/teacher", "--teacher-license", "apache-2.0"]


def test_a_run_leaves_its_recipe_for_info_cards_and_the_hub(model: Path, tmp_path: Path, capsys: Capture) -> None:
    expected = {"e": 0.5, "measured": "on the 3rd of May"}
    recipe = write_yaml(tmp_path / "recipe.yaml", distill_recipe(model) | {"expected": expected})
    pairs = tmp_path / "pairs"
    assert run("pairs", "--config", recipe, "--out", pairs, "pairs.num=4") == 0
    training = ["training.steps=1", "training.preview_every=0"]
    assert run("distill", "--config", recipe, "--pairs", pairs, "--out", tmp_path / "run", *training) == 0
    folder = tmp_path / "run" / "model"
    assert sorted(tree_of(folder)) == ["config.json", "model.safetensors", "recipe.yaml"]
    config = read_config(recipe, DistillConfig, [*training, "pairs.num=4"])
    assert read_config(folder / "recipe.yaml", DistillConfig) == config and config.expected == expected

    capsys.readouterr()
    assert run("info", folder, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["recipe"]["training"]["steps"] == 1 and facts["recipe"]["expected"] == expected
    assert run("info", folder) == 0
    assert "recipe:\n  teacher: " in capsys.readouterr().out

    (tmp_path / "eval.json").write_text(json.dumps(RESULT))
    assert run("card", folder, *LICENCES, "--dataset", "a/set", "--metrics", tmp_path / "eval.json") == 0
    assert f"card -> {folder / 'README.md'}" in capsys.readouterr().out
    matter, body = read(folder / "README.md")
    assert matter["base_model"] == "someone/teacher" and matter["datasets"] == ["a/set"]
    assert "on the 3rd of May" in body and "| 1 | 1 | 0.75 |" in body and f'from_pretrained("{folder}")' in body

    again = DistilledPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (again / "recipe.yaml").read_bytes() == (folder / "recipe.yaml").read_bytes()
    other = DistilledPipeline.from_pretrained(model).save_pretrained(again)
    assert not (other / "recipe.yaml").exists(), "another model's"


def test_weights_that_change_are_written_as_they_are_read(model: Path, tmp_path: Path) -> None:
    recipe = write_yaml(tmp_path / "a.yaml", distill_recipe(model))
    overrides = ["objective.energy={0.5: 1e-5, 0.75: 2}", "pairs.recipe={top_p: 0.5}", "student.starts=[0]"]
    config = read_config(recipe, DistillConfig, overrides)
    (tmp_path / "b.yaml").write_text(as_yaml(config))
    assert read_config(tmp_path / "b.yaml", DistillConfig) == config
    assert "starts: [0]" in (tmp_path / "b.yaml").read_text()


def test_the_card_goes_up_with_its_model(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(card_verb, "upload", lambda *where, **how: (pushed.append((where, how)), "https://the.hub")[1])
    assert run("card", folder, *LICENCES, "--name", "me/mine") == 0 and not pushed
    assert run("card", folder, *LICENCES, "--name", "me/mine", "--push") == 0
    assert run("card", folder, *LICENCES, "--name", "me/mine", "--private") == 0
    assert pushed == [((folder, "me/mine"), {"private": private}) for private in (None, True)]
    out = capsys.readouterr().out
    assert out.count("pushed -> https://the.hub") == out.count("pushing tokenizer ") == 2
    assert 'from_pretrained("me/mine")' in (folder / "README.md").read_text()


def test_cards_of_nothing_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    before = tree_of(folder)
    for arguments, message in (
        (["fashion-var", *LICENCES], "fashion-var is no model folder: it has no config.json"),
        ([folder, *LICENCES[:4]], "required: --teacher-license"),
        ([folder, *LICENCES, "--push"], "--push and --private need --name"),
        ([folder, *LICENCES, "--metrics", tmp_path / "x"], "metrics: there is no file"),
        ([folder, *LICENCES, "--recipe", tmp_path / "x"], "recipe: there is no file"),
    ):
        assert message in refused(capsys, "card", *arguments)
    assert tree_of(folder) == before
    (folder / "model.safetensors").write_bytes(before["model.safetensors"][:-1])
    assert "model.safetensors is damaged" in refused(capsys, "card", folder, *LICENCES)
    assert not (folder / "README.md").exists()
    (folder / "model.safetensors").write_bytes(before["model.safetensors"])
    (folder / "recipe.yaml").write_text("a: [")
    assert "recipe.yaml is no" in refused(capsys, "info", folder)
