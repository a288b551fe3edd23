"""The noise-to-token map holds nothing that is larger than the log-probabilities it is given.

R rows, V codes, C code width.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddecode import flow
from ddecode.flow import flow_grid, noise_to_tokens
from ddecode.teacher import filter_log_probs


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operator returns inside."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kept", [None, 800, 400])
@pytest.mark.parametrize(("V", "C", "rows"), [(4096, 8, 128), (4096, 32, 128), (512, 8, 512)])
def test_no_tensor_is_larger_than_the_log_probabilities(V: int, C: int, rows: int, kept: int | None) -> None:
    log_p = (2.5 * normal(rows, V, seed=0)).log_softmax(-1)
    if kept:
        log_p = filter_log_probs(log_p, top_k=kept)
    codes, noise = normal(V, C, seed=1), normal(rows, C, seed=2)
    grid = flow_grid(codes, 16)
    with LargestTensor() as largest:
        noise_to_tokens(noise[:, None], log_p[:, None], codes, grid=grid)
    assert 0 < largest.bytes <= log_p.nbytes


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "ROWS_TIMES_CODES", 1 << 16)
    codes, log_p = normal(512, 8, seed=1), (2 * normal(1, 512, seed=0)).log_softmax(-1)
    grid = flow_grid(codes, 16)
    for rows in (256, 2048):
        with LargestTensor() as largest:
            noise_to_tokens(normal(rows, 1, 8, seed=2), log_p[:, None].expand(rows, 1, -1), codes, grid=grid)
        assert largest.bytes <= (1 << 16) * 4
