"""What a caller hears of between the passes of a plan, and may change there, as in diffusers' pipelines."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ddecode.arguments import check_vectors, shown
from ddecode.sampling import Progress

CALLBACK_TENSORS = ("embeddings_BLC",)
"""What `callback_on_step_end` may see and change."""
StepCallback = Callable[[Any, int, int, dict[str, Any]], Mapping[str, Any] | None]
"""The pipeline, the number of passes before this one, the number of tokens resolved after it, and the tensors asked
for by name; returns those it changes."""


def check_callback(callback: StepCallback | None, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the tensors that a callback asks for.

    Raises:
        ValueError: it cannot be called, or there are no such tensors.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be a function or None, got {shown(callback)}")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"callback_on_step_end_tensor_inputs must be a list of names, got {shown(names)}")
    check_tensors(names)
    return tuple(names)


def check_tensors(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a callback knows no such tensor.
    """
    if unknown := [str(name) for name in names if name not in CALLBACK_TENSORS]:
        raise ValueError(f"callback_on_step_end knows {', '.join(CALLBACK_TENSORS)}, not {', '.join(unknown)}")


def call_back(callback: StepCallback, pipe: Any, progress: Progress, offered: Sequence[str]) -> None:
    """Show a callback the tensors it asked for and take over those it returns.

    Raises:
        ValueError: it returns no dict of tensors, another tensor, or one of another shape or that is not finite.
    """
    tensors = {name: getattr(progress, name) for name in offered}
    returned = callback(pipe, progress.network_evaluations - 1, progress.resolved, tensors)
    if returned is None:
        return
    if not isinstance(returned, Mapping):
        raise ValueError(f"callback_on_step_end must return a dict of tensors or None, got {type(returned).__name__}")
    check_tensors(tuple(returned))
    for name, tensor in returned.items():
        before = getattr(progress, name)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"callback_on_step_end returned {name}, which is no tensor but {type(tensor).__name__}")
        if tensor.shape != before.shape:
            raise ValueError(f"callback_on_step_end returned {name} {tuple(tensor.shape)} for {tuple(before.shape)}")
        check_vectors(f"{name} that callback_on_step_end returned", tensor, *before.shape[1:])
        before.copy_(tensor)  # the caller's own stays as it is
