"""One run to a folder: the second is refused, a dead one is not in the way."""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command import Capture, refused
from tiny import distill_recipe, tree_of, write_yaml

from ddecode import locks
from ddecode.locks import NAME, held


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with held(folder):
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"another run is at work in {folder}; "), held(folder):
                pass
        (folder / "mine").touch()
    assert [path.name for path in folder.iterdir()] == ["mine"]
    with held(folder):
        pass


def test_a_folder_in_which_nothing_was_written_is_gone_again(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "new" / "newer"):
        with pytest.raises(ZeroDivisionError), held(folder):
            raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_killed_run_is_not_in_the_way(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with held(tmp_path):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(ValueError, match="at work"), held(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / NAME).exists()
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_went_away_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, stale = fcntl.flock, []

    def after_the_last_holder_left(stream: Any, operation: int) -> None:
        if not stale:
            stale.append((tmp_path / NAME).stat().st_ino)
            (tmp_path / NAME).unlink()
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_last_holder_left)
    with held(tmp_path):
        monkeypatch.undo()
        assert (tmp_path / NAME).exists()
        with pytest.raises(ValueError, match="at work"), held(tmp_path):
            pass


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_used_without(
    number: int, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(stream: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if goes_on:
        with held(tmp_path), held(tmp_path):
            pass
    else:
        with pytest.raises(OSError, match=os.strerror(number)), held(tmp_path):
            pass


def test_a_folder_that_went_away_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, folder, gone = Path.mkdir, tmp_path / "x", []

    def as_another_run_leaves(self: Path, *arguments: Any, **options: Any) -> None:
        mkdir(self, *arguments, **options)
        if not gone:
            gone.append(self)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", as_another_run_leaves)
    with held(folder):
        assert (folder / NAME).exists()
    assert gone and not folder.exists()


def test_the_main_process_of_a_launch_holds_it_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path):
        monkeypatch.setattr(locks, "rank", lambda: 1)
        with held(tmp_path):
            pass


@pytest.mark.parametrize("verb", ["pairs", "distill", "sample", "eval"])
def test_a_verb_is_refused_where_another_run_is_at_work(
    verb: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "x"
    recipe = ["--config", write_yaml(tmp_path / "recipe.yaml", distill_recipe(model))]
    arguments = {
        "pairs": [*recipe, "--out", out],
        "distill": [*recipe, "--pairs", tmp_path / "pairs", "--out", out],
        "sample": [model, "--out", out],
        "eval": [model, "--json", tmp_path / "eval.json"],
    }[verb]
    folder = tmp_path / "eval.json.blocks" if verb == "eval" else out
    with held(folder):
        before = tree_of(tmp_path)
        assert f"another run is at work in {folder}" in refused(capsys, verb, *arguments)
        assert tree_of(tmp_path) == before
