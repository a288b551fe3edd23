"""The diffusion head: where it starts from."""

import math

import pytest
import torch
from tiny import seeded

from ddecode.diffusion_head import DiffusionHead


def test_a_fresh_head_gives_the_best_linear_guess() -> None:
    """Least squares of eps - q on x, direction by direction, and what it leaves open is c_out."""
    codebook = torch.randn(6, 2, generator=seeded(0)) * torch.tensor([0.5, 2.0]) + 1
    head = DiffusionHead(4, 2, width=8)
    head.calibrate(codebook)
    q = codebook[torch.randint(6, (100_000,), generator=seeded(1))]
    eps = torch.randn(100_000, 2, generator=seeded(2))
    for time in (1.0, 0.7, 0.3, 0.05):
        x = (1 - time) * q + time * eps
        guess = head(torch.randn(1, 1, 4), x[:, None, None], torch.full((100_000, 1, 1), time))[:, 0, 0]
        assert guess.dtype == torch.float32
        for c in range(2):
            design = torch.stack([x[:, c], torch.ones(len(x))], 1)
            best = design @ torch.linalg.lstsq(design, (eps - q)[:, c : c + 1]).solution
            torch.testing.assert_close(guess[:, c : c + 1], best, atol=0.03 * best.std().item(), rtol=0.03)
            left = (eps - q - guess)[:, c].std().item()
            deviation = codebook[:, c].std(correction=0).item()
            assert left == pytest.approx(deviation / math.hypot((1 - time) * deviation, time), rel=0.02)
