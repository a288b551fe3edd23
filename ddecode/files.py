"""Writing files so that none is ever torn."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A path beside `path`: what is written there is flushed and takes its place at the end.

    Raises:
        OSError: the disk is full, or whatever else the system says, with `path`. Nothing is left behind then.
    """
    aside = path.with_name(path.name + ".new")
    try:
        yield aside
        sync(aside)
        rename(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if number := system_error(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextmanager
def opened_aside(path: Path) -> Iterator[BinaryIO]:
    """`placed`, as a stream."""
    with placed(path) as aside, aside.open("wb") as stream:
        yield stream


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Rename for good."""
    path.rename(target)
    with suppress(OSError):  # not every file system can flush the names in a folder
        sync(target.parent)


def system_error(error: BaseException) -> int | None:
    """The number of a system's error that names no file yet, also where the native code of `torch.save` or safetensors
    wraps it."""
    cause = error.__context__ if type(error) is RuntimeError else error
    if isinstance(cause, OSError):
        return None if cause.filename else cause.errno
    found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def write_aside(path: Path, data: bytes) -> None:
    """Write beside `path`, flush, rename. A failure leaves nothing behind."""
    with opened_aside(path) as stream:
        stream.write(data)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's PNG images in the order of their names, 16 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.png")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
