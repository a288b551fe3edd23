"""A run on disk: whole at any moment, and damage is named."""

import errno
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import room_for
from tiny import tree_of
from torch import nn

from ddecode import run_folder
from ddecode.run_folder import Checkpoint, Log

FILES = ["SHA256SUMS", "ema.safetensors", "model.safetensors", "optimizer.pt", "state.json"]


def make_run() -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    model = nn.Linear(20, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(20)).sum().backward()
    optimizer.step()
    return {"model": model, "ema": nn.Linear(20, 10)}, optimizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Saved after steps 1 and 2."""
    for step in (1, 2):
        Checkpoint(tmp_path).save(step, {"a": (1, 2)}, *make_run())
    return tmp_path


def test_a_checkpoint_is_replaced_as_a_whole_and_the_one_before_it_kept(run: Path) -> None:
    before = tree_of(run / "checkpoint")
    Checkpoint(run).save(3, {"a": (1, 2)}, *make_run())
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint", "checkpoint.old"]
    assert tree_of(run / "checkpoint.old") == before and sorted(before) == FILES
    networks, optimizer = make_run()
    assert Checkpoint(run).load({"a": (1, 2)}, networks, optimizer) == 3
    again = run / "again"
    Checkpoint(again).save(3, {"a": (1, 2)}, networks, optimizer)
    for name in ("ema.safetensors", "model.safetensors", "state.json"):
        assert (again / "checkpoint" / name).read_bytes() == (run / "checkpoint" / name).read_bytes()


def test_checksums_are_those_that_sha256sum_reads(run: Path) -> None:
    lines = (run / "checkpoint" / "SHA256SUMS").read_text().splitlines()
    assert [line[64:] for line in lines] == [f"  {name}" for name in FILES[1:]]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_nothing_is_loaded(name: str, damage: str, run: Path) -> None:
    path = run / "checkpoint" / name
    data = path.read_bytes()
    changed = {"flipped": bytes([data[0] ^ 1]) + data[1:], "truncated": data[: len(data) // 2], "emptied": b""}
    path.unlink()
    if damage in changed:
        path.write_bytes(changed[damage])
    networks, optimizer = make_run()
    before = {key: value.clone() for key, value in networks["model"].state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name}.*; delete .*checkpoint and --resume to go on from the checkpoint"):
        Checkpoint(run).load({"a": (1, 2)}, networks, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in networks["model"].state_dict().items())


def test_the_one_before_a_damaged_checkpoint_takes_its_place(run: Path) -> None:
    checkpoint = Checkpoint(run)
    checkpoint.restore()
    assert checkpoint.load({"a": (1, 2)}, *make_run()) == 2
    (run / "checkpoint").rename(run / "damaged")
    checkpoint.restore()
    assert checkpoint.load({"a": (1, 2)}, *make_run()) == 1
    (run / "checkpoint" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged.* --resume to begin the run again"):
        checkpoint.load({"a": (1, 2)}, *make_run())


def test_a_full_disk_leaves_the_last_checkpoint(run: Path) -> None:
    before = tree_of(run / "checkpoint")
    with room_for(600), pytest.raises(OSError, match=r"too large: .*checkpoint.new/model.safetensors"):
        Checkpoint(run).save(3, {"a": (1, 2)}, *make_run())
    assert tree_of(run) == {f"checkpoint/{name}": data for name, data in before.items()}


def rows_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_log_goes_on_behind_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.sync()
    assert rows_of(path) == [1, 2, 3]
    path.write_text(path.read_text() + '{"step": 4, "lo')
    Log(path, 2).write({"step": 3})
    assert rows_of(path) == [1, 2, 3]
    path.write_text(path.read_text().rstrip("\n"))  # torn before its end
    Log(path, 3).write({"step": 4})
    assert rows_of(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", "\x00\x00"])
def test_a_damaged_line_of_a_log_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged in line 2; delete that line"):
        Log(path, 3)
    assert len(path.read_text().splitlines()) == 3


def test_a_row_that_finds_no_room_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    log.write({"step": 1})
    with room_for(20), pytest.raises(OSError, match=r"No space left .*log\.jsonl") as error:
        log.write({"step": 2, "loss": 1.0})
    assert error.value.errno == errno.ENOSPC and rows_of(path) == [1]
    log.write({"step": 2})
    assert rows_of(path) == [1, 2]


class Killed(BaseException):
    pass


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one of the steps that change the folder."""
    calls: list[str] = []

    def counted(step: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            calls.append(step.__name__)
            if len(calls) > count:
                raise Killed
            step(*arguments, **options)

        return call

    for owner, name in ((run_folder, "rename"), (run_folder, "save_tensors"), (run_folder.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("count", range(7))
def test_a_kill_at_any_step_leaves_a_whole_checkpoint(count: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_after(count, patch)
        with nullcontext() if count == 6 else pytest.raises(Killed):
            Checkpoint(run).save(3, {"a": (1, 2)}, *make_run())
    checkpoint = Checkpoint(run)
    checkpoint.restore()
    assert checkpoint.load({"a": (1, 2)}, *make_run()) == (3 if count == 6 else 2)
