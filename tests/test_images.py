"""Images on disk: what upstream's evaluator reads, and sets read back a batch at a time."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddecode.images import ImageSet, image_name, is_image_set, png, read_note, write_npz


def make_images(num: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(num).integers(0, 256, (num, side, side, 3), np.uint8)


def make_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / image_name(i, i % 3)).write_bytes(png(Image.fromarray(image)))
    return folder


def test_npz_streams_what_savez_writes(tmp_path: Path) -> None:
    images, labels = make_images(7), np.arange(7) % 3
    write_npz(tmp_path / "new" / "x.npz", (images[i : i + 3] for i in (0, 3, 6)), labels)
    np.savez(tmp_path / "upstream.npz", images, labels)
    ours, theirs = (zipfile.ZipFile(tmp_path / name) for name in ("new/x.npz", "upstream.npz"))
    for name in ("arr_0.npy", "arr_1.npy"):
        assert ours.read(name) == theirs.read(name)
        assert ours.getinfo(name).compress_type == theirs.getinfo(name).compress_type == zipfile.ZIP_STORED
    assert np.load(tmp_path / "new" / "x.npz")["labels"].tolist() == labels.tolist()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.npz"]


def test_a_failure_leaves_no_npz(tmp_path: Path) -> None:
    def broken():
        yield make_images(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "x.npz", broken(), np.zeros(4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["folder", "npz", "compressed"])
def test_sets_are_read_in_batches(how: str, tmp_path: Path) -> None:
    images, labels = make_images(8), np.arange(8) % 3
    path = tmp_path / "x.npz"
    if how == "folder":
        path = make_folder(tmp_path / "x", images)
    elif how == "npz":
        write_npz(path, [images], labels)
    else:
        np.savez_compressed(path, arr_0=images, arr_1=labels)
    assert is_image_set(path)
    found = ImageSet.open(path)
    assert found.num == 8 and found.labels_N is not None and found.labels_N.tolist() == labels.tolist()
    batches = list(found.batches(7, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), images[:7])
    assert all(batch.flags.writeable for batch in batches)


def test_grey_images_of_anybody_are_read(tmp_path: Path) -> None:
    Image.fromarray(make_images(1)[0]).convert("L").save(tmp_path / "0.png")
    found = ImageSet.open(tmp_path)
    (batch,) = found.batches(1, 9)
    assert found.labels_N is None and found.note is None and batch.shape == (1, 6, 6, 3)
    assert (batch[..., 0] == batch[..., 2]).all()


def test_a_note_is_read_back(tmp_path: Path) -> None:
    picture = Image.fromarray(make_images(1)[0])
    (tmp_path / "a.png").write_bytes(png(picture, {"seed": 3}))
    (tmp_path / "b.png").write_bytes(png(picture))
    assert read_note(tmp_path / "a.png") == {"seed": 3} and read_note(tmp_path / "b.png") is None
    assert Image.open(tmp_path / "a.png").tobytes() == picture.tobytes()


def test_sets_that_are_none_are_refused(tmp_path: Path) -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            found = ImageSet.open(tmp_path / name)
            list(found.batches(found.num, 2))

    refused("missing.npz", "there is no file")
    refused(".", "holds no images")
    (tmp_path / "junk.npz").write_text("junk")
    refused("junk.npz", "is damaged")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3))
    refused("statistics.npz", "it lacks arr_0")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 6, 6, 3)))
    refused("floats.npz", r"must be uint8 \[N,H,W,3\], got float64 \[2, 6, 6, 3\]")
    folder = make_folder(tmp_path / "folder", make_images(3))
    (folder / "9.png").write_bytes(png(Image.fromarray(make_images(1, side=4)[0])))
    refused("folder", r"9.png is \(4, 4\) pixels large, those before it \(6, 6\)")
    (folder / "9.png").write_bytes(b"torn")
    refused("folder", "9.png is no image, or damaged")
