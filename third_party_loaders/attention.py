"""Attention as every family here calls it.

B batch, H heads, N queries, S keys, d head width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    q_BHNd: Tensor,
    k_BHSd: Tensor,
    v_BHSd: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention; `mask` is bool, True where a query may look, and `causal` stands instead of one.

    `scale` multiplies the scores; None is one over the root of the head width.

    On a CPU the plain formula is faster than the fused kernel in two places and used there: in training (the kernel's
    backward pass takes five times as long at a hundred positions) and for a single query (half as long again).
    """
    training = torch.is_grad_enabled() and q_BHNd.requires_grad
    if q_BHNd.device.type != "cpu" or not (training or q_BHNd.shape[2] == 1):
        return F.scaled_dot_product_attention(q_BHNd, k_BHSd, v_BHSd, attn_mask=mask, is_causal=causal, scale=scale)
    scores = q_BHNd @ k_BHSd.transpose(-1, -2) * (q_BHNd.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1) @ v_BHSd
