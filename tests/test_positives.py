"""Real images as positives: what is read from disk, encoded once, and drawn by class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from scipy.stats import chisquare
from tiny import make_scale_teacher, make_teacher, make_var_teacher, seeded, tree_of

from ddecode import processes
from ddecode.labelled_images import LabelledImages, read_image
from ddecode.objectives import positives as positives_module
from ddecode.objectives.positives import Positives, encode_images, image_size, read_positives
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


@pytest.mark.parametrize("make", [make_teacher, make_var_teacher])
def test_tokens_are_those_of_the_tokenizer_whoever_encodes(
    make: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positives_module, "SHARD_SIZE", 4)
    monkeypatch.setattr(positives_module, "BATCH", 3)
    teacher: Teacher = make()
    images, size = LabelledImages.open(folder, 4), image_size(teacher)
    encode_images(images, teacher, tmp_path / "one", show_progress=False)
    monkeypatch.setattr(processes, "world", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        encode_images(images, teacher, tmp_path / "two", show_progress=False)
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
    for content in (b"torn", save({"codes": torch.zeros(3, 16)}), save({"ids": torch.zeros(2, 16)})):
        (tmp_path / "ids" / "00002.safetensors").write_bytes(content)
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
