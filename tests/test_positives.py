"""Real images as positives: what is read from disk, encoded once, and drawn by class."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from tiny import make_scale_teacher, make_teacher, make_var_teacher, seeded, tree_of

from ddecode.objectives import positives as positives_module
from ddecode.objectives.positives import (
    LabelledImages,
    Positives,
    encode_images,
    image_size,
    read_image,
    read_positives,
)
from ddecode.teacher import Teacher

SIZES = ((9, 7), (8, 8), (20, 31))


def write_image(path: Path, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (*size, 3), generator=seeded(seed), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of four classes with 3, 1, 2 and 5 images."""
    for label, count in enumerate((3, 1, 2, 5)):
        for i in range(count):
            write_image(tmp_path / "images" / f"class{label}" / f"{i}.png", 10 * label + i, SIZES[i % 3])
    (tmp_path / "images" / "class0" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".cache").mkdir()
    return tmp_path / "images"


def test_classes_are_the_sub_folders_in_order(folder: Path) -> None:
    write_image(folder / "class1" / "deeper" / "x.JPEG", 0)
    images = LabelledImages.open(folder, 4)
    assert images.counts_K.tolist() == [3, 2, 2, 5]
    assert [str(path.relative_to(folder)) for path in images.paths[2:5]] == [
        "class0/2.png", "class1/0.png", "class1/deeper/x.JPEG",
    ]  # fmt: skip
    before = images.hash()
    assert before == LabelledImages.open(folder, 4).hash()
    write_image(folder / "class3" / "0.png", 0, (16, 16))
    assert before != LabelledImages.open(folder, 4).hash()


def test_folders_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        LabelledImages.open(folder / "missing", 4)
    with pytest.raises(ValueError, match="holds 4 folders, but the teacher knows 10 classes"):
        LabelledImages.open(folder, 10)
    os.remove(folder / "class1" / "0.png")
    with pytest.raises(ValueError, match="class1 holds no images"):
        LabelledImages.open(folder, 4)


def test_an_image_is_fitted_by_its_tighter_side(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = (255, 0, 102)  # what is in the middle stays
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", (8, 8))
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, -1.0, -0.2]))
    assert (image == image[:, :1, :1]).all()
    assert read_image(tmp_path / "wide.png", (4, 2)).shape == (3, 4, 2)


def test_images_of_other_modes_become_three_channels(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        write_image(tmp_path / f"{mode}.png", 0, mode=mode)
        assert read_image(tmp_path / f"{mode}.png", (8, 8)).shape == (3, 8, 8)


@pytest.mark.parametrize("make", [make_teacher, make_var_teacher])
def test_tokens_are_those_of_the_tokenizer_whoever_encodes(
    make: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positives_module, "SHARD_SIZE", 4)
    monkeypatch.setattr(positives_module, "BATCH", 3)
    teacher: Teacher = make()
    images, size = LabelledImages.open(folder, 4), image_size(teacher)
    encode_images(images, teacher, tmp_path / "one", show_progress=False)
    for rank in (1, 0):
        encode_images(images, teacher, tmp_path / "two", rank=rank, world=2, show_progress=False)
    assert tree_of(tmp_path / "one") == tree_of(tmp_path / "two") and len(tree_of(tmp_path / "one")) == 3
    kept = read_positives(images, tmp_path / "one")
    expected = teacher.tokenizer.encode(torch.stack([read_image(path, size) for path in images.paths]))
    assert kept.ids_NL.dtype == torch.int16 and torch.equal(kept.ids_NL.long(), expected)


def test_what_is_encoded_already_is_not_encoded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positives_module, "SHARD_SIZE", 4)
    teacher, images = make_teacher(), LabelledImages.open(folder, 4)
    encode_images(images, teacher, tmp_path / "ids", show_progress=False)
    before = tree_of(tmp_path / "ids")
    (tmp_path / "ids" / "00001.safetensors").unlink()
    read: list[Path] = []
    monkeypatch.setattr(
        positives_module, "read_image", lambda path, size: (read.append(path), read_image(path, size))[1]
    )
    encode_images(images, teacher, tmp_path / "ids", show_progress=False)
    assert sorted(read) == list(images.paths[4:8]) and tree_of(tmp_path / "ids") == before
    (tmp_path / "ids" / "00002.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"00002.safetensors is damaged; delete it"):
        read_positives(images, tmp_path / "ids")


def test_a_damaged_image_and_a_tokenizer_without_encoder_are_refused(folder: Path, tmp_path: Path) -> None:
    images = LabelledImages.open(folder, 4)
    with pytest.raises(ValueError, match="the teacher's tokenizer has no encoder"):
        encode_images(images, make_scale_teacher(), tmp_path / "ids", show_progress=False)
    whole = images.paths[4].read_bytes()
    images.paths[4].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{images.paths[4].name} is no image, or damaged"):
        encode_images(images, make_teacher(), tmp_path / "ids", show_progress=False)
    assert list((tmp_path / "ids").iterdir()) == []


def test_draws_are_of_the_class_even_and_from_the_generator_alone() -> None:
    counts_K = torch.tensor([3, 1, 4])
    kept = Positives(torch.arange(8)[:, None].to(torch.int16), counts_K)
    labels_B = torch.tensor([2, 0, 1, 2]).repeat(1000)
    drawn_B = kept.draw(labels_B, seeded(0))[:, 0]
    assert drawn_B.dtype == torch.int64 and torch.equal(drawn_B, kept.draw(labels_B, seeded(0))[:, 0])
    for label, members in enumerate(([0, 1, 2], [3], [4, 5, 6, 7])):
        counts = torch.bincount(drawn_B[labels_B == label], minlength=8)
        assert counts.nonzero()[:, 0].tolist() == members
        assert len(members) == 1 or chisquare(counts[members].numpy()).pvalue > 1e-3
