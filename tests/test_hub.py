"""To the hub and back, without it: what is uploaded, and a cache laid out as huggingface_hub lays it out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors.torch import load_file
from test_card import card
from tiny import make_scale_teacher, make_teacher, make_var_student, make_var_teacher, seeded, tree_of

from ddecode import DistilledPipeline
from ddecode.checkpoint import upload
from ddecode.sampling import Skip
from ddecode.teacher import Teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Stands in for `HfApi`: remembers what it is asked."""

    asked: list[Any]

    def __init__(self, token: Any = None) -> None:
        self.asked.append(("token", token))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.asked.append((repo_id, options))
        return type("RepoUrl", (), {"repo_id": f"me/{repo_id.rpartition('/')[2]}"})

    def upload_folder(self, *, folder_path: Path, **options: Any) -> Any:
        self.asked.append((tree_of(folder_path), options))
        return type("CommitInfo", (), {"pr_url": None, "commit_url": "https://the.hub/commit"})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []
    monkeypatch.setattr(FakeHub, "asked", asked, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return asked


def same_images(
    first: DistilledPipeline, second: DistilledPipeline, steps: tuple[Any, ...] = (1, 2, "teacher")
) -> bool:
    def images(pipe: DistilledPipeline, count: Any) -> torch.Tensor:
        return pipe([0, 3], num_inference_steps=count, generator=seeded(1), output_type="pt").images

    return all(torch.allclose(images(first, count), images(second, count), atol=1e-5) for count in steps)


def test_what_is_saved_comes_back(model: Path, tmp_path: Path) -> None:
    pipe = DistilledPipeline.from_pretrained(model)
    pipe.class_names = ("a", "b", "c", "d")
    folder = pipe.save_pretrained(tmp_path / "deep" / "copy")
    assert sorted(tree_of(folder)) == ["config.json", "model.safetensors"]
    again = DistilledPipeline.from_pretrained(folder)
    assert same_images(pipe, again)
    assert again.class_names == pipe.class_names and again.recipe == pipe.recipe
    assert again.notes == pipe.notes == {"features": "fashion-eval"}


@pytest.mark.parametrize("name", ["fashion-llamagen", "fashion-var"])
def test_a_bundled_model_saves_as_it_was_bundled(name: str, tmp_path: Path) -> None:
    pipe = DistilledPipeline.from_pretrained(name)
    again = DistilledPipeline.from_pretrained(pipe.save_pretrained(tmp_path, dtype=torch.float16))
    assert same_images(pipe, again, (1,))
    assert again.notes == pipe.notes and list(again.models) == list(pipe.models)


def test_a_student_alone_is_saved(tmp_path: Path) -> None:
    teacher = make_var_teacher()
    pipe = DistilledPipeline(tokenizer=teacher.tokenizer, student=make_var_student(teacher))
    again = DistilledPipeline.from_pretrained(pipe.save_pretrained(tmp_path))
    assert again.teacher is None and same_images(pipe, again, (1, 2))


def test_types_on_disk(model: Path, tmp_path: Path) -> None:
    def types(**options: Any) -> dict[str, set[torch.dtype]]:
        found: dict[str, set[torch.dtype]] = {}
        for name, tensor in load_file(pipe.save_pretrained(tmp_path, **options) / "model.safetensors").items():
            found.setdefault(name.partition(".")[0], set()).add(tensor.dtype)
        return found

    pipe = DistilledPipeline.from_pretrained(model)
    half, full = {torch.bfloat16}, {torch.float32}
    assert types() == dict.fromkeys(("tokenizer", "teacher", "student"), full)
    assert types(dtype=torch.bfloat16) == dict.fromkeys(("tokenizer", "teacher", "student"), half)
    pipe.to(torch.bfloat16)
    assert types() == {"tokenizer": full | half, "teacher": half, "student": half}, "the decoder is cast, no more"
    assert DistilledPipeline.from_pretrained(tmp_path).dtype == torch.float32
    assert DistilledPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32"):
        pipe.save_pretrained(tmp_path, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32"):
        DistilledPipeline.from_pretrained(tmp_path, torch_dtype=torch.int8)


def test_what_cannot_be_saved_is_refused(pipe: DistilledPipeline, tmp_path: Path, asked: list[Any]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a model is a folder"):
        pipe.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"repo_id, private: give push_to_hub=True"):
        pipe.save_pretrained(tmp_path / "new", repo_id="me/new", private=True)
    with pytest.raises(ValueError, match="push_to_hub needs a card"):
        pipe.save_pretrained(tmp_path / "new", push_to_hub=True)
    toy = make_scale_teacher()
    with pytest.raises(ValueError, match="only models of llamagen, var can be saved, and ScaleBackbone with Scale"):
        DistilledPipeline(tokenizer=toy.tokenizer, teacher=toy).save_pretrained(tmp_path / "new")
    toy.tokenizer.codebook_VC = torch.randn(32, 8, generator=seeded(0))
    mixed = Teacher(make_teacher().backbone, toy.tokenizer, family="llamagen")
    with pytest.raises(ValueError, match="and LlamaGenTransformer with ScaleTokenizer is neither"):
        DistilledPipeline(tokenizer=mixed.tokenizer, teacher=mixed).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists() and not asked


def test_what_is_pushed(pipe: DistilledPipeline, asked: list[Any]) -> None:
    address = pipe.push_to_hub("mine", card=card(), private=True, token="secret", commit_message="First")
    token, (repo, how), (files, options) = asked
    assert address == "https://the.hub/commit" and token == ("token", "secret")
    assert (repo, how) == ("mine", {"private": True, "exist_ok": True})
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert b'from_pretrained("mine")' in files["README.md"] and b"secret" not in b"".join(files.values())
    assert options["repo_id"] == "me/mine" and options["commit_message"] == "First" and not options["create_pr"]


def test_saving_and_pushing_at_once(pipe: DistilledPipeline, tmp_path: Path, asked: list[Any]) -> None:
    folder = tmp_path / "mine"
    pipe.save_pretrained(folder, card=card(), push_to_hub=True)
    (folder / "notes.txt").write_text("private")
    pipe.save_pretrained(folder, card=card(), push_to_hub=True, repo_id="me/other", create_pr=True)
    (_, (first, _), _, _, (second, _), (_, options)) = asked
    assert (first, second) == ("mine", "me/other") and options["create_pr"]
    assert "notes.txt" not in options["allow_patterns"]


def test_a_folder_without_a_card_is_not_uploaded(model: Path, asked: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"tiny has no README\.md"):
        upload(model, "me/tiny")
    assert not asked


@pytest.mark.parametrize(
    "error", [HFValidationError("no such name"), OfflineModeIsEnabled("offline\nindeed"), ConnectionResetError()]
)
def test_what_the_hub_refuses_is_one_sentence(
    error: Exception, pipe: DistilledPipeline, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    def create_repo(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(FakeHub, "create_repo", create_repo)
    with pytest.raises(ValueError, match=r"does not take 'me/mine': (no such name|offline|ConnectionResetError)$"):
        pipe.push_to_hub("me/mine", card=card())


def cached(model: Path, cache: Path) -> Path:
    """A hub's cache with the model as `me/tiny`: blobs, a snapshot of links to them, and the branch that names it."""
    repo = cache / "models--me--tiny"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    for number, (name, content) in enumerate(tree_of(model).items()):
        blob = repo / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    (repo / "refs" / "main").write_text(COMMIT)
    return cache


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_the_cache_serves_without_a_network(
    revision: str | None, pipe: DistilledPipeline, model: Path, tmp_path: Path
) -> None:
    cache = cached(model, tmp_path)
    options: dict[str, Any] = {"cache_dir": cache, "local_files_only": True}
    assert same_images(pipe, DistilledPipeline.from_pretrained("me/tiny", revision=revision, **options), (1,))
    with pytest.raises(ValueError, match="no local folder 'me/other', and the hub does not give it"):
        DistilledPipeline.from_pretrained("me/other", **options)


def test_a_connection_that_breaks_off_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whichever HTTP client huggingface_hub stands on."""
    kind = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)

    def snapshot_download(*args: Any, **options: Any) -> None:
        raise kind("timed out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="the hub does not give it: timed out"):
        DistilledPipeline.from_pretrained("me/tiny")


def test_a_cached_repository_that_is_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    cache = cached(model, tmp_path)
    (cache / "models--me--tiny" / "snapshots" / COMMIT / "config.json").unlink()
    with pytest.raises(ValueError, match=r"me/tiny is no model: it has no config\.json"):
        DistilledPipeline.from_pretrained("me/tiny", cache_dir=cache, local_files_only=True)


def test_the_recipe_goes_to_the_hub_and_comes_back(pipe: DistilledPipeline, tmp_path: Path, asked: list[Any]) -> None:
    folder = pipe.save_pretrained(tmp_path / "mine")
    (folder / "recipe.yaml").write_text("teacher: someone/teacher\n")
    DistilledPipeline.from_pretrained(folder).push_to_hub("me/mine", card=card())
    files, options = asked[-1]
    assert files["recipe.yaml"] == b"teacher: someone/teacher\n" and "recipe.yaml" in options["allow_patterns"]
    assert b"```yaml\nteacher: someone/teacher\n```" in files["README.md"]
    cache = cached(folder, tmp_path / "cache")
    again = DistilledPipeline.from_pretrained("me/tiny", cache_dir=cache, local_files_only=True)
    assert again.training_recipe == "teacher: someone/teacher\n"


def test_offline_by_the_environment(model: Path, tmp_path: Path) -> None:
    script = """
import socket, sys
def refuse(*args, **options): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
from ddecode import DistilledPipeline
pipe = DistilledPipeline.from_pretrained("me/tiny")
pipe.set_progress_bar_config(disable=True)
print(pipe([0], output_type="np").images.shape)
try:
    DistilledPipeline.from_pretrained("me/other")
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cached(model, tmp_path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    shape, refusal = done.stdout.splitlines()
    assert shape == "(1, 8, 8, 3)" and "no local folder 'me/other'" in refusal


def test_models_it_plans_with_are_looked_up_in_the_same_cache(model: Path, tmp_path: Path) -> None:
    folder = DistilledPipeline.from_pretrained(model).save_pretrained(tmp_path / "with-others")
    config = json.loads((folder / "config.json").read_text()) | {"others": {"small": "me/tiny"}}
    (folder / "config.json").write_text(json.dumps(config))
    cache = cached(model, tmp_path / "cache")
    pipe = DistilledPipeline.from_pretrained(folder, cache_dir=cache, local_files_only=True)
    assert "small" in pipe.models
    pipe.others["mine"] = Skip(length=pipe.length)
    saved = json.loads((pipe.save_pretrained(tmp_path / "again") / "config.json").read_text())
    assert saved["others"] == {"small": "me/tiny"}
