"""Linear maps, on a CPU by oneDNN.

torch gives fp32 products on a CPU to MKL, which on an AMD EPYC reaches half of oneDNN's rate, and at the few rows of a
cached AR step a third (all matrices of LlamaGen-L at 2 rows: 146 ms against 50). Half precision goes to oneDNN anyway.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEWEST_PRODUCTS = 1 << 19
"""With fewer multiplications, starting oneDNN takes longer than it saves."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, up to rounding.

    Gradients, autocast, and compilation, which chooses for itself, stay with torch.
    """
    if not is_plain(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a large fp32 product on a CPU, and nothing but that, where torch has oneDNN."""
    return (
        not torch.compiler.is_compiling()
        and x.numel() * weight.shape[0] >= FEWEST_PRODUCTS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
