"""Files are whole or absent, whoever writes them."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from disk import room_for
from PIL import Image

from ddecode import files
from ddecode.checkpoint import save_tensors
from ddecode.files import opened_aside, placed, write_aside
from ddecode.images import png, write_npz

LARGE = np.random.default_rng(0).integers(0, 256, (20, 100, 100, 3), np.uint8)


def save_torch(path: Path) -> None:
    with opened_aside(path) as stream:
        torch.save({"large": torch.from_numpy(LARGE)}, stream)


WRITERS = {
    "bytes": lambda path: write_aside(path, LARGE.tobytes()),
    "png": lambda path: write_aside(path, png(Image.fromarray(LARGE.reshape(1000, 200, 3)))),
    "npz": lambda path: write_npz(path, [LARGE], np.zeros(20)),
    "safetensors": lambda path: save_tensors(path, {"large": torch.from_numpy(LARGE)}),
    "pt": save_torch,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_where_there_is_no_room_the_file_stays_as_it_was(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "x"
    for before in (None, b"before"):
        if before:
            path.write_bytes(before)
        with room_for(100_000), pytest.raises(OSError, match="File too large") as error:
            write(path)
        assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"x": before} if before else {})
    write(path)
    assert path.stat().st_size > 100_000


def test_other_mistakes_stay_what_they_are(tmp_path: Path) -> None:
    for mistake in (ValueError("mine"), RuntimeError("mine"), OSError("mine"), FileNotFoundError(2, "none", "theirs")):
        with pytest.raises(type(mistake)) as error, placed(tmp_path / "x") as aside:
            aside.write_bytes(b"half")
            raise mistake
        assert error.value is mistake
    assert list(tmp_path.iterdir()) == []


def test_content_and_name_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[list[str]] = []
    sync = files.sync

    def recorded(path: Path) -> None:
        flushed.append([path.name, *(p.name for p in tmp_path.iterdir())])
        sync(path)

    monkeypatch.setattr(files, "sync", recorded)
    write_aside(tmp_path / "x", b"content")
    assert flushed == [["x.new", "x.new"], [tmp_path.name, "x"]]
