"""Folders of anybody's images: classes, formats and sizes of all kinds; what is damaged is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import seeded

from ddecode.labelled_images import LabelledImages, read_all, read_image, read_pixels


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (*size, 3), generator=seeded(seed), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of four classes with 3, 1, 2 and 5 images, and what is to be passed over."""
    for label, count in enumerate((3, 1, 2, 5)):
        for i in range(count):
            write_image(tmp_path / "images" / f"class{label}" / f"{i}.png", 10 * label + i)
    (tmp_path / "images" / "class0" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "class0" / "._0.png").write_text("what some systems leave behind")
    (tmp_path / "images" / ".cache").mkdir()
    write_image(tmp_path / "images" / "class0" / ".thumbnails" / "0.png", 1)
    write_image(tmp_path / "images" / "class0" / ".thumbnails" / "small" / "0.png", 1)
    return tmp_path / "images"


def test_classes_are_the_sub_folders_in_order(folder: Path) -> None:
    write_image(folder / "class1" / "deeper" / "x.JPEG")
    images = LabelledImages.open(folder)
    assert images.counts_K.tolist() == [3, 2, 2, 5]
    assert images.class_names == ("class0", "class1", "class2", "class3")
    assert images.labels_N.tolist() == [0] * 3 + [1] * 2 + [2] * 2 + [3] * 5
    assert [str(path.relative_to(folder)) for path in images.paths[2:5]] == [
        "class0/2.png", "class1/0.png", "class1/deeper/x.JPEG",
    ]  # fmt: skip


def test_a_set_is_told_by_names_and_sizes(folder: Path) -> None:
    before = LabelledImages.open(folder, 4).hash()
    assert before == LabelledImages.open(folder, 4).hash()
    write_image(folder / "class3" / "0.png", size=(16, 16))
    assert before != LabelledImages.open(folder, 4).hash()


def test_without_sub_folders_all_are_of_one_class(folder: Path) -> None:
    images = LabelledImages.open(folder / "class3")
    assert images.counts_K.tolist() == [5] and images.class_names == () and images.labels_N.tolist() == [0] * 5
    assert LabelledImages.open(folder / "class3", 1).hash() == images.hash()


def test_folders_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        LabelledImages.open(folder / "missing")
    with pytest.raises(ValueError, match="holds 4 folders, but the teacher knows 10 classes"):
        LabelledImages.open(folder, 10)
    loose = write_image(folder / "loose.png")
    with pytest.raises(ValueError, match=r"both folders, which are classes, and images beside them: loose\.png$"):
        LabelledImages.open(folder)
    loose.unlink()
    (folder / "class1" / "0.png").unlink()
    with pytest.raises(ValueError, match="class1 holds no images"):
        LabelledImages.open(folder)
    (folder / "class0" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        LabelledImages.open(folder / "class0" / "empty")


def test_an_image_is_fitted_by_its_tighter_side(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = (255, 0, 102)  # what is in the middle stays
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", (8, 8))
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, -1.0, -0.2]))
    assert (image == image[:, :1, :1]).all()
    assert read_pixels(tmp_path / "wide.png", (4, 2)).shape == (3, 4, 2)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp", "x.gif", "x.tiff", "x.ppm"])
def test_every_format_is_read(name: str, tmp_path: Path) -> None:
    """One colour survives any of them, but for what compression takes."""
    Image.new("RGB", (12, 9), (200, 40, 90)).save(tmp_path / name)
    found = read_pixels(LabelledImages.open(tmp_path).paths[0], (5, 5)).float()
    assert (found - torch.tensor([200.0, 40, 90])[:, None, None]).abs().max() < 8


def test_every_mode_becomes_three_channels_of_8_bits(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "LA", "RGBA"):
        assert read_pixels(write_image(tmp_path / f"{mode}.png", mode=mode), (8, 8)).dtype == torch.uint8
    write_image(tmp_path / "cmyk.jpg", mode="CMYK")
    assert read_pixels(tmp_path / "cmyk.jpg", (8, 8)).shape == (3, 8, 8)
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert (read_pixels(tmp_path / "deep.png", (8, 8)) == 0x80).all()
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    left, right = read_pixels(tmp_path / "clear.png", (8, 8))[:, 0, [0, 7]].T.tolist()
    assert (left, right) == ([10, 20, 30], [255, 255, 255])


def test_a_camera_that_lay_on_its_side_is_heeded(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = read_pixels(tmp_path / "x.png", (8, 8))
    assert (upright[:, :, 7] == 255).all() and (upright[:, :, :7] == 0).all()


def test_all_are_read_in_order(folder: Path) -> None:
    images = LabelledImages.open(folder)
    pixels = read_all(images, 8, show_progress=False)
    assert pixels.dtype == torch.uint8 and pixels.shape == (11, 3, 8, 8)
    assert all(torch.equal(pixels[i], read_pixels(path, (8, 8))) for i, path in enumerate(images.paths))


def test_all_damaged_images_are_named_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (folder / "class0" / "1.png").read_bytes()
    (folder / "class0" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "class2" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"2 of 11 files in .*images are no images.*: class0/1\.png, class2/0\.png$"):
        read_all(LabelledImages.open(folder), 8, show_progress=False)
    for i in range(5):
        (folder / "class3" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"7 of 11 .*class3/2\.png, \.\.\.$"):
        read_all(LabelledImages.open(folder), 8, show_progress=False)
    with monkeypatch.context() as change:  # as a few kilobytes may unfold to gigabytes
        change.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with pytest.raises(ValueError, match=r"class1/0\.png is no image, or damaged"):
            read_pixels(folder / "class1" / "0.png", (8, 8))
