"""Counted operations against counts by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddecode.linear import Linear
from ddecode.operations import counted


def counted_in(run: object, *inputs: torch.Tensor) -> int:
    with torch.no_grad(), counted() as operations:
        run(*inputs)  # type: ignore[operator]
    return operations.count


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Linear])
def test_linear(kind: type[nn.Linear], autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert counted_in(kind(8, 5), torch.ones(7, 3, 8)) == 2 * 7 * 3 * 8 * 5


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_convolution(memory: torch.memory_format) -> None:
    images = torch.ones(2, 4, 10, 12).to(memory_format=memory)
    assert counted_in(nn.Conv2d(4, 6, 3, padding=1), images) == 2 * (2 * 10 * 12) * (9 * 4) * 6


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril()}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_counts_all_pairs(options: dict, dtype: torch.dtype) -> None:
    q_BHNd = torch.ones(2, 3, 9, 16, dtype=dtype)
    count = counted_in(lambda q: F.scaled_dot_product_attention(q, q, q, **options), q_BHNd)
    assert count == 2 * (2 * 3 * 9 * 9 * 16) * 2


def test_what_is_outside_does_not_count() -> None:
    torch.ones(4, 4) @ torch.ones(4, 4)
    assert counted_in(torch.exp, torch.ones(4, 4)) == 0
