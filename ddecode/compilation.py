"""Compiling a model with `torch.compile`, block by block.

The blocks of a transformer share their code, so the first one's compilation serves all: seconds instead of minutes.
"""

from typing import Any

from torch import nn


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile in place the blocks that a model repeats, with these options of `torch.compile`; it happens in their
    first passes."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(True for _ in block.children()):
                    block.compile(**options)
