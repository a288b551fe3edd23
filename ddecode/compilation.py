"""Compiling a model with `torch.compile`, block by block.

The blocks of a transformer share their code, so the first one's compilation serves all: seconds instead of minutes.
"""

from typing import Any

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(True for _ in block.children())]


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_blocks` had it."""
    return any(block._compiled_call_impl is not None for block in repeated_blocks(model))


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile in place the blocks that a model repeats, with these options of `torch.compile`; it happens in their
    first passes."""
    for block in repeated_blocks(model):
        block.compile(**options)
