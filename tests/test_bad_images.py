"""Damaged and hostile images, arrays and feature networks: one line that names them, little memory, no code run."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Capture, refused
from safetensors.torch import save_file
from tiny import tree_of

from ddecode.evaluation.features import FeatureNetwork, load_features, save_features
from ddecode.evaluation.zoo import Judge
from ddecode.images import ImageSet, read_note


def write_npz(path: Path, **arrays: tuple[tuple[int, ...], str, bytes]) -> None:
    """Arrays by what their headers say and what follows."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, descr, data) in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)  # type: ignore[arg-type]
                entry.write(data)


IMAGES = ((2, 4, 4, 3), "|u1", bytes(96))


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


PWNED = pickle.dumps(Evil())


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": ((2, 4, 4, 3), "|u1", bytes(90))},
        {"arr_0": ((2, 1 << 20, 1 << 20, 3), "|u1", bytes(90))},
        {"arr_0": ((-2, 4, 4, 3), "|u1", bytes(96))},
        {"arr_0": ((2, 4, 4, 3), "<f4", bytes(384))},
        {"arr_0": ((2, 4, 4, 3), "|O", PWNED)},
        {"x": IMAGES},
        {"arr_0": IMAGES, "labels": ((2,), "|O", PWNED)},
        {"arr_0": IMAGES, "labels": ((3,), "<i8", bytes(24))},
        {"arr_0": IMAGES, "labels": ((1 << 34,), "<i8", bytes(1 << 26))},
        {"arr_0": IMAGES, "labels": ((2,), "<f8", bytes(16))},
    ],
    ids=["short", "huge", "negative", "floats", "objects", "absent", "code", "three", "bomb", "float labels"],
)
def test_damaged_arrays_are_named(arrays: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "x.npz", arr_0=IMAGES, labels=((2,), "<i8", bytes(16)))
    assert sum(map(len, ImageSet.open(tmp_path / "x.npz").batches(2, 1))) == 2
    write_npz(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=r"x\.npz"):
        list(ImageSet.open(tmp_path / "x.npz").batches(2, 1))
    assert not (tmp_path / "pwned").exists()


def png_of(width: int, height: int) -> bytes:
    """A picture that is small on disk, whatever its header says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(50), png_of(1 << 20, 1 << 20), png_of((1 << 31) - 1, 2)]
)
def test_damaged_pictures_are_named(data: bytes, model: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "000000-class0.png").write_bytes(data)
    with pytest.raises(ValueError, match="000000-class0"):
        read_note(folder / "000000-class0.png")
    before = tree_of(folder)
    assert "000000-class0" in refused(capsys, "sample", model, "--num", 2, "--out", folder)
    assert tree_of(folder) == before


def test_damaged_feature_networks_are_named(tmp_path: Path, model: Path, capsys: Capture) -> None:
    folder = tmp_path / "features"
    save_features(folder, FeatureNetwork(widths=(4, 8)).eval())
    load_features(folder)
    config, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    for wrong in ("{", "[]", "{}", '{"widths": 3}', *(json.dumps(json.loads(config) | change) for change in (
        {"widths": [4, 9]}, {"widths": []}, {"widths": [10**9]}, {"blocks": 0}, {"blocks": "x"}, {"num_classes": None},
    ))):  # fmt: skip
        (folder / "config.json").write_text(wrong)
        refused(capsys, "eval", model, "--num", 8, "--features", folder)
    (folder / "config.json").write_text(config)
    save_file({"mean": torch.zeros(7), "covariance": torch.zeros(7, 7)}, folder / "statistics.safetensors")
    with pytest.raises(ValueError, match="does not belong to the network beside it"):
        Judge.open(folder)
    width = load_features(folder).widths[-1]
    for mean in (torch.full((width,), torch.nan), torch.zeros(width, dtype=torch.int32)):
        save_file({"mean": mean, "covariance": torch.eye(width)}, folder / "statistics.safetensors")
        with pytest.raises(ValueError, match=r"statistics\.safetensors is damaged: its statistics are not finite"):
            Judge.open(folder)
    (folder / "statistics.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"statistics\.safetensors is damaged"):
        Judge.open(folder)
    (folder / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_features(folder)
