"""Seeds: every random number follows from a seed and an index, never from a batch, a device or a process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ddecode.types import Generators


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all parts (non-negative ints) but zeros at the end, and on nothing else."""
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


def per_sample_generators(generator: Generators, batch: int) -> list[torch.Generator]:
    """One generator for each sample: a list is taken as it is, a single one (None: torch's own) serves them in turn.

    Raises:
        ValueError: a list of another length, of something else, or of another device than the CPU.
    """
    one = torch.default_generator if generator is None else generator
    each = list(one) if isinstance(one, Sequence) else [one] * batch
    if not all(isinstance(g, torch.Generator) for g in each):
        raise ValueError("generator must be one torch.Generator, a list of them, or None")
    if not all(g.device.type == "cpu" for g in each):
        raise ValueError("noise is drawn on the CPU, the same for all devices: give torch.Generator() without a device")
    if len(each) != batch:
        raise ValueError(f"{len(each)} generators for {batch} samples: give one, or one each")
    return each


def draw_noise(generator: Generators, batch: int, shape: tuple[int, int]) -> Tensor:
    """Standard normal fp32 [B,L,C] on the CPU, drawn sample by sample: that of image i never depends on the batch."""
    each = per_sample_generators(generator, batch)
    return torch.stack([torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in each])


def draw_uniforms(generator: Generators, batch: int, length: int) -> Tensor:
    """fp32 [B,L] in [0, 1) on the CPU, drawn sample by sample."""
    each = per_sample_generators(generator, batch)
    return torch.stack([torch.rand(length, generator=g, dtype=torch.float32, device="cpu") for g in each])


class StepGenerator(torch.Generator):
    """The random numbers of one training step, for `draw`: a sample's depend on the step and on its place in the whole
    batch, not on the process that has it. As a plain generator it gives numbers that belong to no sample.

    Args:
        seed: the step's.
        places: of this process's samples.
    """

    def __new__(cls, seed: int, places: Sequence[int]) -> "StepGenerator":
        return super().__new__(cls)

    def __init__(self, seed: int, places: Sequence[int]) -> None:
        self.manual_seed(derived_seed(seed, 0, places[0]))
        self.samples = [torch.Generator().manual_seed(derived_seed(seed, 1, place)) for place in places]


def draw(function: Callable[..., Tensor], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """`function(shape, generator=generator)`; with a `StepGenerator` each sample's along the first dimension from its
    own, the first ones where there are fewer than it knows."""
    if not isinstance(generator, StepGenerator):
        return function(shape, generator=generator)
    assert shape[0] <= len(generator.samples)
    return torch.stack([function(shape[1:], generator=own) for own in generator.samples[: shape[0]]])
