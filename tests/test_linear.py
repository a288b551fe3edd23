"""Linear maps by oneDNN against torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddecode.linear import FEWEST_PRODUCTS, Linear, linear

LARGE = (64, 128, 256)
"""Rows, width and outputs of a product that is worth oneDNN."""
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Calls(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def onednn(self) -> bool:
        return any(name.startswith("mkldnn._linear_pointwise") for name in self.names)


def product(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    _, width, outputs = LARGE
    generator = torch.Generator().manual_seed(0)
    shapes = ((*leading, width), (outputs, width), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, bias


@needs_onednn
@pytest.mark.parametrize("leading", [(64,), (4, 16), (2, 2, 16)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_large_products_are_onednns_and_equal(leading: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = product(*leading)
    assert x.numel() * len(weight) >= FEWEST_PRODUCTS
    with Calls() as calls:
        ours = linear(x, weight, bias if with_bias else None)
    assert calls.onednn
    torch.testing.assert_close(ours, F.linear(x, weight, bias if with_bias else None))


@needs_onednn
def test_strided_operands() -> None:
    x, weight, bias = product(64)
    expected = F.linear(x, weight, bias)
    wide = torch.zeros(64, 256)
    wide[:, ::2] = x
    for rows, matrix in ((x.T.contiguous().T, weight), (x, weight.T.contiguous().T), (wide[:, ::2], weight)):
        with Calls() as calls:
            torch.testing.assert_close(linear(rows, matrix, bias), expected)
        assert calls.onednn


def test_few_and_empty_rows_are_torchs() -> None:
    for leading in ((1,), (0,), (3, 0), ()):
        x, weight, bias = product(*leading)
        with Calls() as calls:
            assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        assert not calls.onednn


def test_gradients_half_precision_and_autocast_are_torchs() -> None:
    x, weight, bias = product(64)
    layer = Linear(*LARGE[1:])
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(LARGE[2], -1))
    assert linear(x.requires_grad_(), weight, bias).requires_grad
    half = linear(x.detach().bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.detach(), weight, bias).dtype == torch.bfloat16


def test_compiled_code_is_torchs() -> None:
    x, weight, bias = product(64)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))
    [graph] = graphs
    assert "linear" in graph.code and "mkldnn" not in graph.code
