"""Attention: one result whichever way it is computed.

B batch, H heads, N queries, S keys, d head width.
"""

import pytest
import torch
from tiny import seeded
from torch.nn import functional as F

from third_party_loaders.attention import attend


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_attention_is_the_same_with_and_without_gradients(causal: bool, masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 4, generator=seeded(0))
    mask = (torch.rand(2, 1, 7, 7, generator=seeded(1)) > 0.5) | torch.eye(7, dtype=torch.bool) if masked else None
    plain = attend(q, k, v, mask, causal=causal)
    trained = attend(q.requires_grad_(), k, v, mask, causal=causal)
    assert trained.requires_grad and not plain.requires_grad
    torch.testing.assert_close(trained.detach(), plain)


@pytest.mark.parametrize("kind", ["open", "causal", "masked"])
@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_bf16_attention_a_few_heads_at_a_time_is_near_fp32(
    kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("third_party_loaders.attention.SCORES_AT_ONCE", at_once)
    q, k, v = torch.randn(3, 2, 3, 9, 8, generator=seeded(0)).bfloat16()
    allowed = (torch.rand(9, 9, generator=seeded(1)) > 0.5) | torch.eye(9, dtype=torch.bool)
    mask, causal = allowed if kind == "masked" else None, kind == "causal"
    exact = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, scale=0.25
    )
    ours = attend(q, k, v, mask, causal=causal, scale=0.25)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query_is_exact_over_part_of_a_cache(
    dtype: torch.dtype, scale: float | None, masked: bool
) -> None:
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool().expand(3, 1, 1, 7) if masked else None
    cached = torch.randn(2, 3, 2, 12, 8, generator=seeded(0))
    q = torch.randn(3, 2, 1, 8, generator=seeded(1)).to(dtype)
    k, v = cached[:, :, :, :7].unbind(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = attend(q, k, v, mask, scale=scale)
    assert ours.dtype == dtype
    exact = F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(ours, exact.to(dtype))
