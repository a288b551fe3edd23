"""What a judge sees of a set, batch by batch. The processes of a launch share the batches; beside a result that is to
be written they are kept until it is, so that an evaluation that was stopped goes on.

N samples of a set, B of a batch.
"""

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ddecode.files import opened_aside
from ddecode.locks import held
from ddecode.processes import in_turn, rank

P = TypeVar("P")
Block = dict[str, np.ndarray]
"""Arrays [B,...] of a batch, by their names."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """
    Args:
        folder: where they are kept; None keeps nothing.
    """

    folder: Path | None = None

    def of(
        self, identity: Callable[[], Mapping[str, Any]], see: Callable[[P], Block], pieces: Iterable[P]
    ) -> Iterator[Block]:
        """The blocks of a set, in order; those that are kept are read.

        Args:
            identity: all that the set follows from, for JSON.
            see: makes the block of a piece.
            pieces: the set's.

        Raises:
            ValueError: one that was kept is damaged.
        """
        if self.folder is None:
            return in_turn(see, pieces)
        name = hashlib.sha256(json.dumps(identity(), sort_keys=True).encode()).hexdigest()[:16]

        def block(numbered: tuple[int, P]) -> Block:
            assert self.folder is not None
            path = self.folder / f"{name}-{numbered[0]:05d}.npz"
            if path.exists():
                return read_block(path)
            made = see(numbered[1])
            with opened_aside(path) as stream:
                np.savez(stream, **made)  # type: ignore[arg-type]
            return made

        return in_turn(block, enumerate(pieces))


NOT_KEPT = Blocks()


def read_block(path: Path) -> Block:
    """
    Raises:
        ValueError: its checksums say that it is damaged.
    """
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f"{path} is damaged; delete it, and it will be made again") from None


def progress_bar(num: int, shown: bool, what: str) -> tqdm:
    """Of a set of `num`, for one of a launch's processes."""
    return tqdm(total=num, unit="img", disable=not shown or rank() > 0, leave=False, desc=what)


def counted(blocks: Iterable[Block], bar: Any) -> Iterator[Block]:
    """Blocks as they are, moving a progress bar by their samples."""
    for block in blocks:
        yield block
        bar.update(len(next(iter(block.values()))))


def joined(blocks: Iterable[Block]) -> Block:
    """All of a set, [N,...]."""
    found = list(blocks)
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


@contextmanager
def kept_beside(result: Path | None) -> Iterator[Blocks]:
    """Blocks that are kept in `RESULT.blocks` until the end, when `result` has been written; None keeps nothing.

    Raises:
        ValueError: another evaluation is at work on the same result.
    """
    if result is None:
        yield NOT_KEPT
        return
    folder = result.with_name(f"{result.name}.blocks")
    with held(folder):
        yield Blocks(folder=folder)
        if rank() == 0:
            shutil.rmtree(folder)
