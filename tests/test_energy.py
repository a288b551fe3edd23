"""The distance between distributions: unbiased, its formula, and the same under less noise with a memory.

B batch, N remembered samples, F feature width.
"""

import torch
from tiny import seeded
from torch import Tensor

from ddecode.objectives.energy import Memory, RememberedEnergy, energy_distance, spread_within, standardise


def draw(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return shift + scale * torch.randn(count, 5, generator=seeded(seed))


def full_energy(ours: Tensor, theirs: Tensor, labels: Tensor) -> float:
    """With the constant E|y - y'| put back: 0 in expectation for equal distributions."""
    constant = (torch.cdist(theirs, theirs) * off_diagonal(labels)).sum() / off_diagonal(labels).sum()
    return (energy_distance(ours, theirs, labels) - constant).item()


def off_diagonal(labels: Tensor) -> Tensor:
    return ((labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)).float()


def test_energy_distance_is_unbiased_and_tells_distributions_apart() -> None:
    labels = torch.arange(24) % 3
    by_class = labels[:, None].float() * 3
    equal = torch.tensor(
        [full_energy(draw(24, s) + by_class, draw(24, 900 + s) + by_class, labels) for s in range(150)]
    )
    error = (equal.std() / len(equal) ** 0.5).item()
    assert abs(equal.mean().item()) < 3.5 * error
    for change in ({"shift": 0.5}, {"scale": 0.5}, {"scale": 1.7}):
        other = [full_energy(draw(24, s, **change) + by_class, draw(24, 900 + s) + by_class, labels) for s in range(60)]
        assert sum(other) / 60 > 10 * error, change


def test_energy_distance_is_its_formula_and_leaves_other_classes_and_the_own_pair_out() -> None:
    ours, theirs, labels = draw(6, 0), draw(6, 1), torch.tensor([0, 1, 0, 1, 0, 2])
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j and labels[i] == labels[j]]
    across = sum((ours[i] - theirs[j]).norm() for i, j in pairs) / len(pairs)
    within = sum((ours[i] - ours[j]).norm() for i, j in pairs) / len(pairs)
    torch.testing.assert_close(energy_distance(ours, theirs, labels), 2 * across - within)


def test_energy_distance_has_finite_gradients_at_equal_samples() -> None:
    ours = torch.zeros(4, 5, requires_grad=True)
    energy_distance(ours, torch.zeros(4, 5), torch.zeros(4)).backward()
    assert ours.grad is not None and ours.grad.isfinite().all()


def test_energy_distance_of_classes_with_one_sample_each_is_zero() -> None:
    assert energy_distance(draw(3, 0), draw(3, 1), torch.arange(3)).item() == 0


def test_standardise_measures_in_spreads_of_the_second() -> None:
    ours, theirs = standardise(draw(50, 0) * 10, draw(50, 1) * torch.tensor([1.0, 10, 100, 1000, 1e4]))
    torch.testing.assert_close(theirs.std(0) * 5**0.5, torch.ones(5), atol=2e-3, rtol=0)
    assert ours[:, 4].abs().max() < 0.1


def test_a_memory_keeps_the_last_samples() -> None:
    memory = Memory(5, 2)
    assert (memory.labels_N == -1).all()
    features, labels = draw(14, 0)[:, :2], torch.arange(14)
    for part in (slice(0, 3), slice(3, 7), slice(7, 14)):
        memory.add(features[part], labels[part])
        kept = min(5, part.stop)
        assert sorted(memory.labels_N[memory.labels_N >= 0].tolist()) == list(range(part.stop - kept, part.stop))
        for label, feature in zip(memory.labels_N.tolist(), memory.features_NF, strict=True):
            assert label < 0 or torch.equal(feature, features[label])
    Memory(0, 2).add(features, labels)


def test_the_spread_within_classes_is_that_around_their_means() -> None:
    labels = torch.arange(300) % 3 - 1  # a third does not count
    features = draw(300, 0) * torch.tensor([1.0, 2, 3, 4, 5]) + 100 * labels[:, None]
    counted = [features[labels == c] for c in (0, 1)]
    expected = torch.stack([part.var(0, correction=0) for part in counted]).mean(0).sqrt()
    torch.testing.assert_close(spread_within(features, labels), expected, atol=1e-3, rtol=1e-3)


def test_without_a_memory_value_and_gradient_are_the_energy_distances() -> None:
    ours, theirs, labels = draw(12, 0).requires_grad_(), draw(12, 1), torch.arange(12) % 2
    scale = (spread_within(theirs, labels) + 1e-3) * 5**0.5
    expected = energy_distance(ours / scale, theirs / scale, labels)
    found, _ = RememberedEnergy(5, theirs=0, ours=0)(ours, theirs, labels)
    torch.testing.assert_close(found, expected)
    (gradient,), (theirs_gradient,) = (torch.autograd.grad(value, ours) for value in (found, expected))
    torch.testing.assert_close(gradient, theirs_gradient)


def test_a_memory_is_set_against_the_batch_as_if_it_were_part_of_it() -> None:
    remembered = RememberedEnergy(5, theirs=24, ours=12)
    labels = torch.arange(12) % 3
    batches = [(draw(12, s), draw(12, 50 + s)) for s in range(3)]
    *_, last = (remembered(ours, theirs, labels)[0] for ours, theirs in batches)
    ours = batches[-1][0]
    all_theirs, all_ours = torch.cat([b[1] for b in batches]), torch.cat([b[0] for b in batches[1:]])
    scale = (spread_within(all_theirs, labels.repeat(3)) + 1e-3) * 5**0.5

    def distances(others: Tensor, own: int) -> float:
        pairs = [
            ((ours[i] - other) / scale).norm()
            for i in range(12)
            for j, other in enumerate(others)
            if labels[i] == labels[j % 12] and j != own + i
        ]
        return float(torch.stack(pairs).mean())

    expected = 2 * distances(all_theirs, 24) - distances(all_ours, 12)
    torch.testing.assert_close(last.item(), expected, atol=1e-4, rtol=1e-4)
    assert remembered.ours.labels_N.tolist() == labels.tolist() and "theirs.features_NF" in remembered.state_dict()


def test_a_memory_lowers_the_noise_and_not_the_mean() -> None:
    labels = torch.arange(24) % 3

    def values(memory: int) -> Tensor:
        remembered = RememberedEnergy(5, theirs=24 * memory, ours=24 * memory)
        found = [remembered(draw(24, s, shift=0.5), draw(24, 900 + s), labels)[0] for s in range(80)]
        return torch.stack(found[20:])

    few, many = values(0), values(10)
    # unbiased but for the scale, which few samples underestimate
    assert abs(many.mean() / few.mean() - 1) < 0.25
    assert many.std() < few.std() / 1.3


def test_each_kind_of_sample_is_set_against_its_own() -> None:
    labels, kinds = torch.arange(18) % 3, torch.arange(18) // 3 % 2
    ours, theirs = draw(18, 0), draw(18, 1)
    found, metrics = RememberedEnergy(5, theirs=0, ours=0, kinds=3)(ours, theirs, labels, kinds)
    scale = (spread_within(theirs, labels) + 1e-3) * 5**0.5

    def mean_distance(i: int, others: Tensor, peers: list[int]) -> Tensor:
        return torch.stack([((ours[i] - others[j]) / scale).norm() for j in peers if j != i]).mean()

    alike = [[j for j in range(18) if labels[i] == labels[j]] for i in range(18)]
    of_kind = [[j for j in alike[i] if kinds[i] == kinds[j]] for i in range(18)]
    across = torch.stack([mean_distance(i, theirs, alike[i]) for i in range(18)])
    within = torch.stack([mean_distance(i, ours, of_kind[i]) for i in range(18)])
    torch.testing.assert_close(found, 2 * across.mean() - within.mean())
    assert metrics["spread_K"].shape == (3,) and metrics["spread_K"][2] == 1


def test_a_sample_without_peers_of_its_own_is_not_pulled_to_the_middle() -> None:
    """The only one of its class and kind, and nothing remembered of it: there is nothing to push it away."""
    labels = torch.tensor([0, 0, 0, 1])
    ours = draw(4, 0).requires_grad_()
    remembered = RememberedEnergy(5, theirs=8, ours=0)
    remembered(ours, draw(4, 1), labels)
    (gradient,) = torch.autograd.grad(remembered(ours, draw(4, 2), labels)[0], ours)
    assert not gradient[3].any() and gradient[:3].abs().sum(1).min() > 0
    alone = RememberedEnergy(5, theirs=8, ours=0)
    value, metrics = alone(ours, draw(4, 1), torch.arange(4))
    assert value.item() == 0 and metrics["spread_K"].item() == 1 and alone.multiplier_K.item() == 0


def test_a_wide_kind_does_not_make_up_for_a_narrow_one() -> None:
    labels, kinds = torch.zeros(400, dtype=torch.int64), torch.arange(400) % 2
    scale = torch.tensor([0.8, 1.2])[kinds].requires_grad_()
    ours = scale[:, None] * draw(400, 0)
    remembered = RememberedEnergy(5, theirs=0, ours=0, kinds=2)
    (gradient,) = torch.autograd.grad(remembered(ours, draw(400, 1), labels, kinds)[0], scale)
    narrow, wide = gradient[kinds == 0].sum(), gradient[kinds == 1].sum()
    assert narrow < -0.02 and wide > 0.02


def test_the_multiplier_keeps_the_spread_against_a_term_that_narrows_it() -> None:
    labels = torch.arange(64) % 2

    def learned_spread(spread_rate: float) -> tuple[float, RememberedEnergy]:
        scale = torch.ones((), requires_grad=True)
        optimizer = torch.optim.SGD([scale], lr=0.02)
        remembered = RememberedEnergy(5, theirs=640, ours=64, spread_rate=spread_rate)
        found = []
        for step in range(600):
            distance, metrics = remembered(scale * draw(64, step), draw(64, 5000 + step), labels)
            optimizer.zero_grad()
            (distance + 0.3 * scale).backward()
            optimizer.step()
            found.append(metrics["spread_K"].item())
        return sum(found[-200:]) / 200, remembered

    narrow, plain = learned_spread(0.0)
    kept, remembered = learned_spread(0.02)
    assert narrow < 0.9 and plain.multiplier_K.item() == 0
    assert abs(kept - 1) < 0.02
    # where the spread is right, the slopes of the distance and of the narrowing term cancel: m times E|y - y'| is 0.3
    apart = (draw(2000, 1) - draw(2000, 2)).norm(dim=1).mean().item() / 5**0.5
    assert "multiplier_K" in remembered.state_dict() and abs(remembered.multiplier_K.item() * apart - 0.3) < 0.05
