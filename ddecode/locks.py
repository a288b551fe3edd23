"""One run to a folder: a lock that the kernel lets go of when its holder dies."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from ddecode.arguments import check_kind
from ddecode.processes import launch, meet, rank

NAME = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system that knows no locks answers; there a folder goes unlocked."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs off a folder. The processes of a launch are one run: they begin and end together.

    Args:
        folder: made if missing; where nothing is written, it is gone again afterwards.

    Raises:
        ValueError: another run is at work there, or it is a file.
    """
    check_kind("a folder to write in", folder, Path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    launch()
    with locked(folder) if rank() == 0 else nullcontext():
        meet()
        yield
        meet()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    with take(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is let go of: see `take`
            with suppress(OSError):
                for empty in made:
                    empty.rmdir()


def take(path: Path) -> BinaryIO:
    """A lock file that is ours and still there: its last holder may have deleted it meanwhile, and its folder."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = path.open("ab")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                return stream
            stream.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(f"another run is at work in {path.parent}; wait for its end, or choose another") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
        stream.close()
