"""How many floating-point operations a computation takes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Shape = tuple[int, ...]


@dataclass(kw_only=True)
class Operations:
    """Filled when the `with` block ends."""

    count: int = 0


def attention_on_cpu(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Of torch's fused attention for CPUs."""
    return sdpa_flop_count(query, key, value)


def linear_of_onednn(x: Shape, weight: Shape, *_: object, **__: object) -> int:
    """Of oneDNN's linear map, which `ddecode.linear` calls."""
    return 2 * math.prod(x) * weight[0]


UNKNOWN_TO_TORCH = {
    ("aten", "_scaled_dot_product_flash_attention_for_cpu"): attention_on_cpu,
    ("mkldnn", "_linear_pointwise"): linear_of_onednn,
}
"""Operators that torch's counter leaves out, by namespace and name; a build of torch may lack some."""


@contextmanager
def counted() -> Iterator[Operations]:
    """Count what runs inside: matrix products, convolutions and attention, a multiplication and an addition as two.

    Attention counts all pairs of positions, masked ones too; element-wise work counts nothing. Inside, compiled modules
    run as they were written: torch's compiler sees a counter as a reason to give them up for good.
    """
    operations = Operations()
    known = {
        getattr(getattr(torch.ops, space), name): formula
        for (space, name), formula in UNKNOWN_TO_TORCH.items()
        if hasattr(getattr(torch.ops, space), name)
    }
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False, custom_mapping=known) as mode:
        yield operations
    operations.count = mode.get_total_flops()
