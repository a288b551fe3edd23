"""Seeds: fresh weights repeat and leave torch's own generator alone."""

import torch
from torch import nn

from ddecode.randomness import fresh_weights


def test_fresh_weights_follow_from_their_seed_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    weights = []
    for seed in (5, 5, 6):
        with fresh_weights(seed):
            weights.append(nn.Linear(2, 2).weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.rand(3), expected), "the global generator moved"
