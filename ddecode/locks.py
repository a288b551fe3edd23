"""One run to a folder: a lock that the kernel lets go of when its holder dies."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from torch import distributed

NAME = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system that knows no locks answers; there a folder goes unlocked."""


@contextmanager
def held(folder: Path, *, leader: bool = True) -> Iterator[None]:
    """Keep other runs off a folder.

    Args:
        folder: made if missing; where nothing is written, it is gone again afterwards.
        leader: whether this process holds the lock. Of the processes of one launch one does, and they begin and end
            together. Processes that were launched one by one do not wait for each other.

    Raises:
        ValueError: another run is at work there.
    """
    with locked(folder) if leader else nullcontext():
        meet()
        folder.mkdir(parents=True, exist_ok=True)
        yield
        meet()


def meet() -> None:
    """Wait for the other processes of a launch, if there are any."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
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
    """A lock file that is ours and still there: its last holder may have deleted it meanwhile."""
    while True:
        stream = path.open("ab")
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
