"""Writing files so that none is ever torn; reading those that may be damaged."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

LARGEST_JSON = 1 << 24
"""Bytes; a config has about a thousand."""


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


def check_writable(path: Path, option: str) -> None:
    """Refuse an output file that could not be written, before the work that it is for.

    Raises:
        ValueError: it is a folder, or lies where none can be made; the message begins with `option`.
    """
    if path.is_dir():
        raise ValueError(f"{option} names a folder, {path}; give a file")
    check_room(path, option)


def check_room(path: Path, option: str) -> None:
    """Refuse a path where nothing can be made; see `check_writable`."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if existing.is_file() and existing == path.absolute():
        existing = existing.parent
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError:
        raise ValueError(f"{option} {path}: cannot write in {existing}") from None


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: it is missing, or no JSON of a config's size.
    """
    try:
        if path.stat().st_size <= LARGEST_JSON:
            return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"there is no file {path}") from None
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged: it is no JSON")


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file whose names begin with `prefix`, by the rest of their names.

    Raises:
        ValueError: it is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        with safe_open(path, "pt") as file:
            names = sorted(name for name in file.keys() if name.startswith(prefix))  # noqa: SIM118 (no mapping)
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
