"""Attention as every family here calls it.

B batch, H heads, N queries, S keys, d head width; X any leading shape.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES_AT_ONCE = 2**20
"""2 MiB in bf16: they stay in the cache between the two products, and memory does not grow with the batch."""


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

    On a CPU the plain formula is faster than the fused kernel in three places and used there: in training (the kernel's
    backward pass takes five times as long at a hundred positions), for a single query (see `attend_one`) and in bf16
    (twice as long).
    """
    queries, keys = q_BHNd.shape[2], k_BHSd.shape[2]
    training = torch.is_grad_enabled() and q_BHNd.requires_grad
    if q_BHNd.device.type == "cpu" and queries == 1 and not causal and not training:
        return attend_one(q_BHNd, k_BHSd, v_BHSd, mask, scale=scale)
    k_BHSd, v_BHSd = k_BHSd.type_as(q_BHNd), v_BHSd.type_as(q_BHNd)  # a cache may be of another precision
    one_mask = mask is None or mask.dim() == 2
    few_heads = not training and queries > 1 and q_BHNd.dtype == torch.bfloat16 and one_mask
    if q_BHNd.device.type != "cpu" or not (training or queries == 1 or few_heads):
        return F.scaled_dot_product_attention(q_BHNd, k_BHSd, v_BHSd, attn_mask=mask, is_causal=causal, scale=scale)
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    bias = None if mask is None else torch.zeros(mask.shape, dtype=q_BHNd.dtype).masked_fill(~mask, -math.inf)
    q_BHNd = q_BHNd * (q_BHNd.shape[-1] ** -0.5 if scale is None else scale)
    if not few_heads:
        return mix(q_BHNd, k_BHSd, v_BHSd, bias)
    heads = max(1, SCORES_AT_ONCE // (queries * keys))
    groups = zip(*(x.flatten(0, 1).split(heads) for x in (q_BHNd, k_BHSd, v_BHSd)), strict=True)
    return torch.cat([mix(q, k, v, bias) for q, k, v in groups]).unflatten(0, q_BHNd.shape[:2])


def attend_one(q_BH1d: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask: Tensor | None, *, scale: float | None) -> Tensor:
    """A single query to all keys, on a CPU, in fp32 whatever the dtype of the query.

    torch copies keys and values of half precision that are part of a cache before it multiplies them. Keys stand left,
    for which the product reads them in order.
    """
    scale = q_BH1d.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        scores = (k_BHSd.float() @ (q_BH1d.float() * scale).transpose(-1, -2)).transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return (torch.softmax(scores, -1) @ v_BHSd.float()).type_as(q_BH1d)


def mix(q_XNd: Tensor, k_XSd: Tensor, v_XSd: Tensor, bias: Tensor | None) -> Tensor:
    """The plain formula, of scaled queries and what is added to the scores."""
    scores = q_XNd @ k_XSd.transpose(-1, -2)
    if bias is not None:
        scores += bias
    return torch.softmax(scores, -1) @ v_XSd
