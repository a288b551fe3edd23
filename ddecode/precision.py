"""Device and precision of models that sample: half-precision networks and decoder around a codebook and a map that stay
fp32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ddecode.mapped_student import MappedStudent
from ddecode.student import Student
from ddecode.teacher import Teacher
from ddecode.types import Tokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What networks may be cast to, in memory and on disk."""


def network(model: Student | Teacher) -> nn.Module:
    """The module that holds a model's own weights."""
    module = model.backbone if isinstance(model, Teacher) else model
    assert isinstance(module, nn.Module)
    return module


def decoder(tokenizer: Tokenizer) -> nn.Module | None:
    """The part of a tokenizer that half precision takes: its module `decoder`, where it has one."""
    module = getattr(tokenizer, "decoder", None)
    return module if isinstance(module, nn.Module) else None


def dtype_of(module: nn.Module | None) -> torch.dtype | None:
    """Of a module's parameters; None where it has none."""
    return next((parameter.dtype for parameter in module.parameters()), None) if module is not None else None


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module's parameters. Its buffers, rotary factors and the like, are exact in fp32 alone and stay so, and so
    does the head of a student that leaves the tokens to the map."""
    exact = {id(parameter) for parameter in module.head()} if isinstance(module, MappedStudent) else set()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in exact else dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to a half precision; fp32 leaves one that is open as it is."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def check_device(device: torch.device | str) -> None:
    """
    Raises:
        ValueError: it is not there.
    """
    try:
        there = not torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError, TypeError):
        there = False
    if not there:
        raise ValueError(f"there is no device {str(device)!r} here")


def check_dtype(dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError: networks are not cast to it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
