"""The adversarial term: each side's gradient is its own, and it pulls one distribution onto another."""

import pytest
import torch
from tiny import C, L, V, make_student, scramble, seeded
from torch import Tensor, nn

from ddecode.evaluation.features import FeatureMaps, FeatureNetwork
from ddecode.objective_config import AdversarialConfig, ObjectiveConfig
from ddecode.objectives.adversarial import Discriminator, adversarial_losses
from ddecode.objectives.positives import Positives
from ddecode.objectives.student import StudentObjective
from ddecode.teacher import Teacher

LABELS = torch.arange(8) % 2


def maps_of(points_BF: Tensor) -> FeatureMaps:
    """Feature maps of one stage, 2 x 2 places alike."""
    stage = points_BF[:, :, None, None].expand(-1, -1, 2, 2)
    return FeatureMaps(stages=(stage,), pooled_BF=points_BF, logits_BK=points_BF)


def make_discriminator(channels: int = 2) -> Discriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Discriminator((channels,), 2, width=16)


def test_each_sides_gradient_is_its_own() -> None:
    discriminator = make_discriminator()
    ours, theirs = torch.randn(8, 2, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    student_loss, critic_loss, _ = adversarial_losses(discriminator, maps_of(ours), maps_of(theirs), LABELS, LABELS)
    critic_loss.backward()
    assert ours.grad is None and theirs.grad is None
    gradients = [p.grad.clone() for p in discriminator.parameters()]
    assert sum(g.abs().sum() for g in gradients) > 0
    student_loss.backward()
    assert ours.grad is not None and ours.grad.abs().max() > 0 and theirs.grad is None
    for parameter, before in zip(discriminator.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, before), "the student's loss moved the discriminator"


def test_the_losses_are_the_hinge() -> None:
    discriminator = make_discriminator().eval()
    ours, theirs = maps_of(torch.randn(8, 2, generator=seeded(1))), maps_of(torch.randn(8, 2, generator=seeded(2)))
    says = [discriminator(maps.stages, LABELS).detach() for maps in (ours, theirs)]
    student_loss, critic_loss, metrics = adversarial_losses(discriminator, ours, theirs, LABELS, LABELS)
    # the power iterations of the spectral norm move a little in training mode
    assert student_loss.item() == pytest.approx(-says[0].mean().item(), abs=0.05)
    hinge = (1 - says[1]).clamp(min=0).mean() + (1 + says[0]).clamp(min=0).mean()
    assert critic_loss.item() == pytest.approx(hinge.item(), abs=0.1)
    assert metrics["verdict_positive"].item() == pytest.approx(says[1].mean().item(), abs=0.05)


def test_points_move_onto_the_distribution_of_their_class() -> None:
    """A generator of one shift for each class finds the two means; without the class it could not."""
    discriminator, shift = make_discriminator(), nn.Embedding(2, 2)
    nn.init.zeros_(shift.weight)
    means = torch.tensor([[1.0, -1.0], [-1.0, 0.5]])
    optimizer = torch.optim.Adam(
        [{"params": shift.parameters(), "lr": 0.02}, {"params": discriminator.parameters(), "lr": 0.01}],
        betas=(0.0, 0.99),
    )
    g, labels, trail = seeded(3), torch.arange(64) % 2, []
    for _ in range(400):
        ours = 0.3 * torch.randn(64, 2, generator=g) + shift(labels)
        theirs = 0.3 * torch.randn(64, 2, generator=g) + means[labels]
        losses = adversarial_losses(discriminator, maps_of(ours), maps_of(theirs), labels, labels)
        optimizer.zero_grad()
        (losses[0] + losses[1]).backward()
        optimizer.step()
        trail.append(shift.weight.detach().clone())
    # the two players circle around the answer: their mean over time is there
    torch.testing.assert_close(torch.stack(trail[200:]).mean(0), means, atol=0.25, rtol=0)


def test_the_objective_trains_it_as_a_critic(teacher: Teacher) -> None:
    features = FeatureNetwork(widths=(4, 8), blocks=1, num_classes=4)
    scramble(features, 7)
    config = ObjectiveConfig(logits=0.0, adversarial=AdversarialConfig(weight={0.5: 2.0}, lr=3e-3, width=8))
    student = make_student(teacher, split=L)
    objective = StudentObjective(student, config, features=features.eval().requires_grad_(False))
    assert objective.critic_lr == {"discriminator": 3e-3}
    noise, ids = torch.randn(8, L, C, generator=seeded(0)), torch.randint(V, (8, L), generator=seeded(1))
    _, before = objective(noise, ids, LABELS, generator=seeded(2), progress=0.4)
    assert "verdict_student" not in before
    loss, metrics = objective(noise, ids, LABELS, generator=seeded(2), progress=0.5)
    assert {"verdict_positive", "verdict_student"} <= set(metrics)
    loss.backward()
    assert sum(p.grad.abs().sum() for p in objective.critics.parameters()) > 0
    assert student.backbone.output.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in features.parameters())


def test_real_images_take_the_place_of_the_teachers(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The discriminator sees them decoded from their tokens, of the batch's classes; the other terms do not."""
    features = FeatureNetwork(widths=(4, 8), blocks=1, num_classes=4)
    scramble(features, 7)
    config = ObjectiveConfig(energy=1.0, adversarial=AdversarialConfig(weight=1.0, width=8), image_batch=6)
    real_NL = torch.randint(V, (10, L), generator=seeded(4), dtype=torch.int32)
    positives = Positives(real_NL, torch.tensor([3, 5, 1, 1]))
    noise, ids = torch.randn(8, L, C, generator=seeded(0)), torch.randint(V, (8, L), generator=seeded(1))
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    metrics = {}
    for real in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            objective = StudentObjective(
                make_student(teacher, starts=(0,)), config, features=features.eval(),
                positives=positives if real else None,
            )  # fmt: skip
        look = objective.look
        monkeypatch.setattr(objective, "look", lambda codes, r=real, f=look: (seen[r].append(codes), f(codes))[1])
        metrics[real] = objective(noise, ids, LABELS, generator=seeded(2))[1]
    assert [len(seen[real]) for real in (False, True)] == [2, 3]
    for ours, theirs in zip(seen[False], seen[True][:2], strict=True):
        assert torch.equal(ours, theirs)
    drawn = (seen[True][2][:, None] == teacher.codebook_VC[real_NL.long()][None]).all(-1).all(-1)
    assert (drawn.sum(1) == 1).all()
    assert all((0 if i < 3 else 1) == label for i, label in zip(drawn.float().argmax(1), LABELS[:6], strict=True))
    assert metrics[True]["energy"] == metrics[False]["energy"]
    assert metrics[True]["verdict_student"] == metrics[False]["verdict_student"]
    assert metrics[True]["verdict_positive"] != metrics[False]["verdict_positive"]
