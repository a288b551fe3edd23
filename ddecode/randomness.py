"""Seeds: every random number follows from a seed and an index, never from a batch, a device or a process."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all parts (non-negative ints), and on nothing else."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def fresh_weights(seed: int) -> Iterator[None]:
    """Modules built inside draw their weights from this seed; torch's global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` in a set drawn with `seed`."""
    return derived_seed(seed, index)


def sample_generators(seed: int, indices: range | list[int]) -> list[torch.Generator]:
    """One generator for each sample of a set drawn with `seed`."""
    return [torch.Generator().manual_seed(sample_seed(seed, i)) for i in indices]
