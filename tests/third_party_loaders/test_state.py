"""Reading states as people have them: every wrapper, prefix, file and folder; nothing run, nothing guessed."""

import argparse
import builtins
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from third_party_loaders import identify
from third_party_loaders.state import check_names, is_hub_id, read_state, unwrap

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}
OTHER = {"a.weight": torch.zeros(2, 3), "b": torch.tensor([0, 0])}


def same(state: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in expected)


# --- wrappers and prefixes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["model", "module", "state_dict", "ema", "trainer.ema_parameters", "trainer.var_wo_ddp", "state_dict.model"]
)
def test_every_wrapper_is_opened(path: str, tmp_path: Path) -> None:
    tree: dict[str, Any] = dict(STATE)
    for key in reversed(path.split(".")):
        tree = {key: OrderedDict(tree), "epoch": 3, "args": argparse.Namespace(lr=1e-4), "optimizer": {"state": {}}}
    found = unwrap(tree, (), "it")
    assert same(found.tensors) and found.wrapper == path
    torch.save(tree, tmp_path / "x.pth")
    assert same(read_state(tmp_path / "x.pth"))


def test_of_several_states_the_preferred_one_is_taken() -> None:
    tree = {"model": OTHER, "ema": STATE}
    assert same(read_state(tree), OTHER) and same(read_state(tree, ("ema",)))
    trainer = {"trainer": {"var_wo_ddp": OTHER, "ema_parameters": STATE, "vae_local": {"c": torch.zeros(1)}}}
    assert same(read_state(trainer), OTHER) and same(read_state(trainer, ("trainer", "ema_parameters")))
    assert list(read_state(trainer, ("vae_local",))) == ["c"]
    assert same(read_state({"ema": {}, "model": STATE}, ("ema",))), "an empty wrapper holds no state"


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.module.module."]
)
def test_prefixes_come_off(prefix: str) -> None:
    assert same(read_state({prefix + name: tensor for name, tensor in STATE.items()}))


def test_inserted_parts_come_off_inside_names_and_a_name_of_its_own_stays() -> None:
    state = {"layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.w": STATE["b"], "submodule.w": STATE["b"]}
    assert list(read_state(state)) == ["layers.0.w", "submodule.w"]
    assert list(read_state({"module.a": STATE["b"], "b": STATE["b"]})) == ["module.a", "b"]


def test_two_names_that_become_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two tensors of this state are a .*_orig_mod\.a"):
        read_state({"a": STATE["b"], "_orig_mod.a": STATE["b"]})


# --- files and folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.pth", "x.bin"])
def test_every_suffix_is_read(name: str, tmp_path: Path) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(STATE, tmp_path / name)
    assert same(read_state(tmp_path / name)) and same(read_state(str(tmp_path))), "the file, and its folder"


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "x.pt")
    read_state(tmp_path / "x.pt")["x"].fill_(1)
    assert not read_state(tmp_path / "x.pt")["x"].any(), "what is written does not reach the file"
    state = read_state(tmp_path / "x.pt")
    assert any(str(tmp_path / "x.pt") in line for line in Path("/proc/self/maps").read_text().splitlines()), state


def test_a_folder_holds_one_state_or_a_usual_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no file with weights"):
        read_state(tmp_path)
    (tmp_path / "README.md").write_text("words")
    torch.save(STATE, tmp_path / "var_d16.pth")
    assert same(read_state(tmp_path))
    torch.save(OTHER, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"several files with weights, vae\.pth, var_d16\.pth: name one"):
        read_state(tmp_path)
    torch.save(OTHER, tmp_path / "pytorch_model.bin")
    assert same(read_state(tmp_path), OTHER)
    save_file(STATE, tmp_path / "model.safetensors")
    assert same(read_state(tmp_path))


def write_shards(folder: Path) -> None:
    shards = {name: f"model-{i}.safetensors" for i, name in enumerate(STATE)}
    for name, shard in shards.items():
        save_file({name: STATE[name]}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def test_shards_are_joined(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert same(read_state(tmp_path)) and same(read_state(tmp_path / "model.safetensors.index.json"))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint file .*model-1\.safetensors"):
        read_state(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": [1]}'])
def test_a_damaged_index_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        read_state(tmp_path)


# --- the hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the repository `someone/weights`."""

    def hf_hub_download(repo: str, name: str) -> str:
        assert repo == "someone/weights"
        if not (tmp_path / name).exists():
            raise LocalEntryNotFoundError(f"no {name}\nand more")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: [f.name for f in tmp_path.iterdir()])
    return tmp_path


def test_a_hub_id_names_a_repository_or_a_file_in_it(hub: Path) -> None:
    torch.save(STATE, hub / "var_d16.pth")
    assert same(read_state("someone/weights")) and same(read_state("someone/weights/var_d16.pth"))
    torch.save(OTHER, hub / "vae.pth")
    with pytest.raises(ValueError, match=r"hub repository someone/weights holds several .*vae\.pth, var_d16\.pth"):
        read_state("someone/weights")
    assert same(read_state("someone/weights/vae.pth"), OTHER)
    with pytest.raises(ValueError, match=r"someone/weights/x\.pth.* the hub does not give it: no x\.pth$"):
        read_state("someone/weights/x.pth")


def test_shards_come_from_the_hub(hub: Path) -> None:
    write_shards(hub)
    assert same(read_state("someone/weights"))


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def list_repo_files(repo: str) -> list[str]:
        raise OSError("no route\nand more")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    with pytest.raises(ValueError, match=r"no local file 'someone/weights', and the hub does not give it: no route$"):
        read_state("someone/weights")


@pytest.mark.parametrize(
    "name", ["model", "model.pth", "runs/model.pth", "./a/b", "/a/b", "../a/b.pth", "~/a/b.pt", "a/b/c", "here/x"]
)
def test_other_names_never_reach_the_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not is_hub_id(name)
    with pytest.raises(ValueError, match="no checkpoint file"):
        read_state(name)


# --- safety and damage ----------------------------------------------------------------------------------------


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.mkdir, os.system, builtins.eval], ids=lambda f: f.__name__)
def test_a_malicious_pickle_is_named_and_not_run(function: Any, zipped: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    command = {"mkdir": str(mark), "system": f"mkdir {mark}", "eval": f"__import__('os').mkdir({str(mark)!r})"}
    evil = Evil(function, command[function.__name__])
    torch.save({"model": STATE, "args": evil}, path, _use_new_zipfile_serialization=zipped)
    named = rf"evil\.pth cannot be read safely: it asks for [\w.]*{function.__name__}, and"
    with pytest.raises(ValueError, match=named):
        read_state(path)
    assert not mark.exists()
    with pytest.raises(ValueError) as caught:
        identify(path)
    assert "weights_only" not in str(caught.value), "no advice to read it unsafely"


def test_modules_and_other_classes_are_refused(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        read_state(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_named(kept: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"x": torch.randn(500)}, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"x\{suffix} (is damaged|cannot be read safely: it is damaged)"):
        read_state(path)


# --- names ----------------------------------------------------------------------------------------------------


def test_missing_extra_and_misshapen_keys_are_one_line() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    with pytest.raises(ValueError) as caught:
        check_names(target, {"b": torch.zeros(5), "c": torch.zeros(4), "d": torch.zeros(1)}, "toy")
    assert str(caught.value) == "this state is no toy: missing a; unknown d; misshapen b is (5,), expected (3,)"
    check_names(target, dict(target), "toy")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"lr": 0.1, "epoch": 3}, "found no weights in the state: expected tensors, or one of .*; got epoch, lr"),
        ({}, "the state is empty"),
        (dict(STATE), r"the state is none of var, .*llamagen-tokenizer: its names are a\.weight, b"),
    ],
    ids=["no weights", "empty", "unknown"],
)
def test_what_is_no_known_state_is_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        identify(state)
