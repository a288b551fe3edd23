"""The processes of a launch (`accelerate launch`, torchrun), where there are several.

Their number changes no result but for float rounding: work is dealt out in pieces that one process does alone, the
random numbers of training belong to samples (`ddecode.randomness.StepGenerator`), and its losses are those of the
samples of all processes together.

B batch.
"""

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

T = TypeVar("T")
R = TypeVar("R")

MOMENT = 0.1
"""Seconds in which threads get the interpreter that wait for it, to let go of what they hold."""


def launch() -> PartialState:
    """Join the other processes, where there are any. Without a GPU they talk through gloo."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    told = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    state = PartialState(cpu=told or (several and not torch.cuda.is_available()))
    if state.num_processes == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and not several:
        tell_alone()
    if several:
        leave_at_exit()
    return state


@cache
def leave_at_exit() -> None:
    """Once: gloo's threads must let go of tensors that Python knows before the interpreter ends, or they may abort it
    after all is done (https://github.com/pytorch/pytorch/pull/179291)."""
    atexit.register(leave)


def leave() -> None:
    """Part from the other processes, where that has not happened."""
    if distributed.is_available() and distributed.is_initialized():
        time.sleep(MOMENT)
        distributed.destroy_process_group()


@cache
def tell_alone() -> None:
    """Once."""
    print(
        "ddecode: accelerate started one process only; without GPUs it starts several with --multi_gpu (gloo is used), "
        "as torchrun --nproc-per-node does",
        file=sys.stderr,
    )


def is_lost(error: Exception) -> bool:
    """Whether it says that another process has ended, which has told why."""
    told = isinstance(error, distributed.DistBackendError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return told and world() > 1


def world() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which one this is; 0 writes and prints."""
    return distributed.get_rank() if world() > 1 else 0


def meet() -> None:
    """Wait for the others."""
    if world() > 1:
        distributed.barrier()


# --- pieces of work -------------------------------------------------------------------------------------------


def share(pieces: Sequence[T]) -> Sequence[T]:
    """This process's: every `world()`-th."""
    return pieces[rank() :: world()]


def in_turn(work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
    """`map`, dealt out: each piece is done by one process, and all get all results, in order. All must iterate alike.
    A result travels by pickle."""
    rest = iter(pieces)
    while some := list(islice(rest, world())):
        own = [work(piece) for piece in share(some)]
        if world() == 1:
            yield from own
            continue
        all_results: list[list[R]] = [[]] * world()
        distributed.all_gather_object(all_results, own)
        yield from chain(*all_results)


def any_of_all(flags: Tensor) -> bool:
    """Whether one holds, in any process."""
    found = flags.any().long()
    if world() > 1:
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


# --- losses ---------------------------------------------------------------------------------------------------


def mean_of_all(total: Tensor, count: Tensor | int) -> Tensor:
    """Sum over count, both over all processes, as this process's loss: the mean of processes counts, so it is `world()`
    times its own part. Zero where the count is.

    Args:
        total: of this process, any shape, with gradients.
        count: of this process, broadcast to it.
    """
    number = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    if world() > 1:
        number = number.clone()
        distributed.all_reduce(number)
    return world() * total / number.clamp(min=1)


def mean_where(values_BL: Tensor, open_BL: Tensor, dim: int | None = None) -> Tensor:
    """Mean over all processes' open positions (1, not 0), along one dimension or both; 0 where none is."""
    return mean_of_all((values_BL * open_BL).sum(dim), open_BL.sum(dim))


def mean_of_processes(value: Tensor) -> Tensor:
    """The mean of what processes have, without gradients."""
    whole = value.detach().clone()
    if world() > 1:
        distributed.all_reduce(whole)
    return whole / world()


class Gather(torch.autograd.Function):
    """See `of_all`."""

    @staticmethod
    def forward(ctx: Any, own_B: Tensor) -> Tensor:
        parts = [torch.empty_like(own_B) for _ in range(world())]
        distributed.all_gather(parts, own_B.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].contiguous()
        distributed.all_reduce(whole)
        return whole.chunk(world())[rank()]


def of_all(own_B: Tensor) -> Tensor:
    """The samples of all processes along the first dimension, as many of each, for a loss that compares them. All
    processes then compute the same loss."""
    return Gather.apply(own_B) if world() > 1 else own_B
