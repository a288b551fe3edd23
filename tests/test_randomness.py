"""Seeds: fresh weights repeat and leave torch's own generator alone; samples have numbers of their own."""

from functools import partial

import torch
from tiny import seeded
from torch import nn

from ddecode.randomness import StepGenerator, draw, fresh_weights


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


def test_a_samples_draws_follow_from_its_place_alone() -> None:
    def draws(places: range) -> list[torch.Tensor]:
        generator = StepGenerator(7, places)
        numbers = draw(torch.rand, (len(places), 3), generator)
        return [
            numbers,
            draw(partial(torch.randint, 9), (len(places),), generator),
            draw(torch.randn, (1, 5), generator),
        ]

    whole, share = draws(range(6)), draws(range(6)[1::2])
    assert torch.equal(whole[0][1::2], share[0]) and torch.equal(whole[1][1::2], share[1])
    assert whole[0].unique().numel() == 18 and not torch.equal(whole[2], share[2])
    assert torch.equal(draw(torch.rand, (2, 3), seeded(1)), torch.rand(2, 3, generator=seeded(1)))
    plain = [torch.rand(4, generator=StepGenerator(7, places)) for places in (range(6), range(6), range(1, 6))]
    assert torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], plain[2])
