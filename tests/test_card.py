"""Model cards: what the hub and people read of a model, and what a card refuses to leave out."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tree_of

from ddecode.card import Card, write_card

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
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in tree_of(model).items():
        (folder / name).write_bytes(content)
    return folder


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
