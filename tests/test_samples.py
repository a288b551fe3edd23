"""Sets of images: labels, and folders that are stopped, gone on with and grown."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command import Capture, refused, run
from tiny import make_pipeline

from ddecode import samples
from ddecode.images import ImageSet, read_note
from ddecode.pipeline import DistilledPipeline
from ddecode.samples import draw_labels, make_settings, weights_hash, write_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_balanced_labels_go_round() -> None:
    labels = draw_labels(range(1000), 50_000)
    assert (np.bincount(labels) == 50).all() and labels[:3].tolist() == [0, 1, 2]
    assert draw_labels([4, 2], 3).tolist() == [4, 2, 4]


def test_uniform_labels_are_independent_and_begin_alike() -> None:
    labels = draw_labels(range(10), 50_000, labelling="uniform", seed=3)
    counts = np.bincount(labels)
    assert ((counts - 5000) ** 2 / 5000).sum() < 27.9, "chi-square of 9 degrees of freedom at 0.1 %"
    pairs = np.bincount(labels[:-1] * 10 + labels[1:])
    assert ((pairs - 500) ** 2 / 500).sum() < 149, "of 99"
    np.testing.assert_array_equal(draw_labels(range(10), 321, labelling="uniform", seed=3), labels[:321])
    assert (draw_labels(range(10), 100, labelling="uniform", seed=4) != labels[:100]).any()
    assert set(draw_labels([7, 2], 50, labelling="uniform").tolist()) == {2, 7}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 3, 4, 9])
def test_a_killed_folder_goes_on_to_the_same_bytes(
    after: int, pipe: DistilledPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pipe.plan(plan="student:0-4,teacher:4-16")
    settings = make_settings(pipe, plan, model="tiny", classes=range(4), num=10, labelling="uniform", seed=5)
    assert write_folder(pipe, plan, settings, tmp_path / "whole", batch=4, show_progress=False) == 10

    written = samples.write_aside

    def torn(path: Path, data: bytes) -> None:
        if len(list(path.parent.glob("*.png"))) == after:
            path.with_name(path.name + ".new").write_bytes(data[:50])
            raise Killed
        written(path, data)

    monkeypatch.setattr(samples, "write_aside", torn)
    with pytest.raises(Killed):
        write_folder(pipe, plan, settings, tmp_path / "x", batch=4, show_progress=False)
    monkeypatch.undo()
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "x").glob("*.png")}
    assert len(kept) == after
    assert write_folder(pipe, plan, settings, tmp_path / "x", batch=4, show_progress=False) == 10 - after
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert all((tmp_path / "x" / name).stat().st_ino == inode for name, inode in kept.items()), "not written again"
    assert write_folder(pipe, plan, settings, tmp_path / "x", batch=3, show_progress=False) == 0


def test_a_folder_goes_on_grows_and_is_packed(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x"
    options = ["sample", model, "--labels", "uniform", "--seed", 2, "--batch", 4, "--out", out]
    assert run(*options, "--num", 6) == 0
    (out / "note.txt").write_text("mine")
    assert run(*options, "--num", 9, "--npz", tmp_path / "x.npz") == 0
    assert "(3 made now)" in capsys.readouterr().out
    note = read_note(next(out.glob("*.png")))
    assert note is not None and (note["plan"], note["labelling"], note["seed"]) == ("student:0-16", "uniform", 2)
    arrays = np.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(arrays["arr_0"], np.concatenate(list(ImageSet.open(out).batches(9, 2))))
    assert arrays["arr_1"].tolist() == draw_labels(range(4), 9, labelling="uniform", seed=2).tolist()


def test_a_folder_of_other_settings_is_refused(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x"
    options = ["sample", model, "--num", 5, "--out", out]
    assert run(*options) == 0
    before = contents(out)
    for others, message in {
        ("--seed", "1"): "another seed (0, not 1)",
        ("--steps", "2"): "another plan ('student:0-16', not ",
        ("--labels", "uniform"): "another labelling ('balanced', not 'uniform')",
        ("--classes", "0,1"): "another classes ([0, 1, 2, 3], not [0, 1])",
        ("--num", "4"): "holds 5 images already; --num may only grow, got 4",
    }.items():
        assert message in refused(capsys, *options, *others)
    (out / "mine.png").write_bytes(before["000000-class0.png"])
    assert "did not make" in refused(capsys, *options)
    (out / "mine.png").unlink()
    assert contents(out) == before


def test_a_folder_of_other_weights_is_refused(pipe: DistilledPipeline, tmp_path: Path) -> None:
    plan, other = pipe.plan(1), pipe.plan("teacher")
    mine, theirs = (make_settings(pipe, p, model="tiny", classes=[0], num=1) for p in (plan, other))
    assert mine.model_hash != theirs.model_hash, "of the weights that take part"
    renamed = make_settings(pipe, plan, model="renamed", classes=[0], num=2)
    write_folder(pipe, plan, mine, tmp_path, batch=2, show_progress=False)
    assert write_folder(pipe, plan, renamed, tmp_path, batch=2, show_progress=False) == 1


def test_equal_weights_of_other_sizes_have_a_hash_of_their_own() -> None:
    """DD1's student converted twice, with `--split` at 10 and at 16."""
    pipes = [make_pipeline(split=split) for split in (10, 16, 10)]
    a, b, again = (weights_hash(pipe, pipe.plan(1)) for pipe in pipes)
    assert a == again != b
    a, b = (weights_hash(pipe, pipe.plan("teacher")) for pipe in pipes[:2])
    assert a == b, "the student takes no part"


def test_half_precision_weights_have_a_hash_of_their_own() -> None:
    pipe = make_pipeline()
    plan = pipe.plan(1)
    exact = weights_hash(pipe, plan)
    half = weights_hash(pipe.to(torch.bfloat16), plan)
    assert half != exact and weights_hash(pipe, plan) == half


def test_sample_refuses_what_it_cannot_pack(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "--npz FILE.npz packs a folder" in refused(
        capsys, "sample", model, "--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz"
    )
    assert "packs a folder" in refused(capsys, "sample", model, "--out", tmp_path / "x", "--npz", tmp_path / "y")
    assert "there is no device 'gpu9' here" in refused(capsys, "sample", model, "--out", tmp_path, "--device", "gpu9")
    assert list(tmp_path.iterdir()) == []


def test_a_gap_in_a_folder_is_told(model: Path, tmp_path: Path) -> None:
    assert run("sample", model, "--num", 4, "--out", tmp_path / "x") == 0
    (tmp_path / "x" / "000001-class1.png").unlink()
    with pytest.raises(ValueError, match="lacks images before 000003"):
        ImageSet.open(tmp_path / "x")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_image_is_named(damage: str, model: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["sample", model, "--num", 5, "--out", tmp_path]
    assert run(*options) == 0
    path = tmp_path / "000003-class3.png"
    whole = path.read_bytes()
    flipped = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]
    path.write_bytes({"flipped": flipped, "truncated": whole[: len(whole) // 2], "emptied": b""}[damage])
    assert f"{path} is no image, or damaged; delete it" in refused(capsys, *options)
    path.unlink()
    assert run(*options) == 0 and path.read_bytes() == whole
