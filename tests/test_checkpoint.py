"""Model folders and names: written and read exactly, refused by name where they are wrong, no network uninvited."""

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import L, save_tiny, seeded, tree_of

from ddecode import DistilledPipeline, load_teacher
from ddecode.checkpoint import ModelFolder, bundled_models, find_model


def change_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_every_weight_comes_back_exactly(pipe: DistilledPipeline, model: Path) -> None:
    assert sorted(tree_of(model)) == ["config.json", "model.safetensors"]
    again = DistilledPipeline.from_pretrained(model)
    for ours, theirs in (
        (pipe.tokenizer, again.tokenizer),
        (pipe.teacher.backbone, again.teacher.backbone),
        (pipe.student, again.student),
    ):
        a, b = ours.state_dict(), theirs.state_dict()
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert again.student.tokenizer is again.tokenizer is again.teacher.tokenizer


def test_all_files_of_a_model_may_be_read_by_the_same_people(pipe: DistilledPipeline, tmp_path: Path) -> None:
    for mask in (0o022, 0o027):
        before = os.umask(mask)
        try:
            folder = save_tiny(tmp_path / oct(mask), pipe)
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~mask}


def test_half_precision_on_disk_is_fp32_in_memory(pipe: DistilledPipeline, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "half", pipe, dtype=torch.float16)
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    again = DistilledPipeline.from_pretrained(folder)
    for part, module in (
        ("teacher", again.teacher.backbone),
        ("student", again.student),
        ("tokenizer", again.tokenizer),
    ):
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"
            assert torch.equal(tensor, stored[f"{part}.{name}"].float())
    assert again([1], generator=seeded(0), output_type="np").images.shape == (1, 8, 8, 3)


def test_load_teacher(model: Path, pipe: DistilledPipeline) -> None:
    teacher = load_teacher(str(model))
    assert teacher.recipe == pipe.teacher.recipe and teacher.family == "llamagen"
    assert sum(teacher.steps) == teacher.length == L
    ids = torch.randint(32, (2, L), generator=seeded(0))
    assert torch.equal(teacher.logits(ids, [0, 1]), pipe.teacher.logits(ids, [0, 1]))


def test_the_hash_tells_teachers_apart(copy: Path, model: Path) -> None:
    before = ModelFolder.open(model).teacher_hash()
    assert len(before) == 16 and ModelFolder.open(copy).teacher_hash() == before
    change_weights(copy, lambda state: state["student.indicator.weight"].add_(1))
    assert ModelFolder.open(copy).teacher_hash() == before, "the student is no part of its teacher"
    change_weights(copy, lambda state: state["teacher.norm.weight"][:1].add_(1e-3))
    changed = ModelFolder.open(copy).teacher_hash()
    assert changed != before
    change_weights(copy, lambda state: state["tokenizer.quant_conv.bias"][:1].add_(1e-3))
    assert ModelFolder.open(copy).teacher_hash() not in (before, changed)


def test_the_hash_tells_teachers_of_the_same_weights_and_other_sizes_apart(copy: Path) -> None:
    before = ModelFolder.open(copy).teacher_hash()
    config = json.loads((copy / "config.json").read_text())
    config["teacher"]["backbone"]["heads"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    assert ModelFolder.open(copy).teacher_hash() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("teacher.norm.weight"), r"missing norm\.weight"),
        (lambda s: s.update({"student.more": torch.zeros(1)}), "unknown more"),
        (lambda s: s.update({"tokenizer.quant_conv.bias": torch.zeros(3)}), r"misshapen quant_conv\.bias is \(3,\)"),
    ],
)
def test_wrong_weights_are_named(change: Any, message: str, copy: Path) -> None:
    change_weights(copy, change)
    with pytest.raises(ValueError, match=message):
        DistilledPipeline.from_pretrained(copy)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_weights_are_refused(size: int, copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        DistilledPipeline.from_pretrained(copy)


def test_absent_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        DistilledPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "no ddecode model of format 1"),
        (lambda c: c.pop("format"), "no ddecode model of format 1"),
        (lambda c: c.pop("family"), "lacks family"),
        (lambda c: c.pop("tokenizer"), "copy has no tokenizer: convert it again with --tokenizer"),
        (lambda c: c.update(family="gpt"), "unknown model family 'gpt'; known are"),
        (lambda c: c["teacher"]["recipe"].update(top_l=3), r"teacher\.recipe\.top_l; did you mean"),
        (lambda c: c["teacher"].pop("backbone"), "backbone"),
        (lambda c: c["teacher"]["backbone"].update(widht=3), "widht"),
        (lambda c: c["student"].pop("starts"), "starts"),
        (lambda c: c["tokenizer"].update(channel_mult=3), "channel_mult"),
        (lambda c: c["tokenizer"].update(color=3), "color"),
    ],
)
def test_wrong_configs_are_refused(change: Any, message: str, copy: Path) -> None:
    change_config(copy, change)
    with pytest.raises(ValueError, match=message):
        DistilledPipeline.from_pretrained(copy)


@pytest.mark.parametrize("text", ["{", "[]", "3", "\udcff"])
def test_damaged_configs_are_refused(text: str, copy: Path) -> None:
    (copy / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelFolder.open(copy)


@pytest.mark.parametrize("name", ["no-such-model", "", "a/b/c", "./nowhere", "/nowhere/at-all", "../nowhere"])
def test_unknown_names_are_refused_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"unknown model|no model folder"):
        find_model(name)


def test_files_and_other_folders_are_no_models(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        find_model(tmp_path)
    with pytest.raises(ValueError, match="is a file; a model is a folder"):
        find_model(model / "config.json")


def test_a_hub_id_is_downloaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot_download(hub_id: str, **options: Any) -> str:
        assert set(options["allow_patterns"]) == {"config.json", "model.safetensors", "recipe.yaml"}
        asked.append(hub_id)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_model("someone/something") == model
    assert load_teacher("someone/something").length == L
    assert asked == ["someone/something"] * 2


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline\nand more"), OSError("no route")])
def test_a_failed_download_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"someone/something.*(offline|no route)") as caught:
        find_model("someone/something")
    assert "\n" not in str(caught.value)


def test_a_local_folder_comes_before_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert find_model("tiny") == Path("tiny")
    monkeypatch.chdir(model.parent.parent)
    assert find_model(f"{model.parent.name}/tiny").samefile(model)


def test_what_a_model_lacks_is_named(model: Path, copy: Path) -> None:
    change_config(copy, lambda config: config.pop("student"))
    folder = ModelFolder.open(copy)
    assert folder.has("teacher") and not folder.has("student")
    with pytest.raises(ValueError, match="copy has no student"):
        folder.student()


@pytest.mark.parametrize("name", bundled_models())
def test_bundled_models_load(name: str) -> None:
    assert find_model(name).name == name
    pipe = DistilledPipeline.from_pretrained(name)
    steps = "teacher" if pipe.student is None else 1
    images = pipe(0, num_inference_steps=steps, generator=seeded(0), output_type="np").images
    assert images.shape[0] == 1 and images.std() > 1
