"""The cache that backbones write to; what backbones and tokenizers must be is in tests/test_conformance.py."""

import pytest
import torch
from tiny import seeded

from ddecode.types import KeyValueCache


def test_a_cache_holds_what_was_written_and_no_more_than_its_capacity() -> None:
    cache = KeyValueCache(1, (2, 1, 3, 4), device="cpu", dtype=torch.float32)
    keys, values = torch.randn(2, 2, 1, 2, 4, generator=seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(cache.extend(0, keys, values), (keys, values), strict=True))
    cache.length = 2
    longer, _ = cache.extend(0, keys[:, :, :1], values[:, :, :1])
    assert torch.equal(longer, torch.cat([keys, keys[:, :, :1]], 2))
    with pytest.raises(AssertionError, match="full"):
        cache.extend(0, keys, values)
