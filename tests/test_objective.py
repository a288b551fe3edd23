"""DD1's objective: its terms and weights, and where its gradients go."""

from typing import Any

import pytest
import torch
from tiny import (
    C,
    L,
    V,
    make_draft_student,
    make_student,
    make_var_teacher,
    make_wavefront_student,
    scramble,
    seeded,
)
from torch import Tensor
from torch.nn import functional as F

from ddecode.evaluation.features import FeatureNetwork, perceptual_distance
from ddecode.flow import noise_to_tokens
from ddecode.objective_config import ObjectiveConfig
from ddecode.objectives.student import StudentObjective, by_step
from ddecode.student import Student
from ddecode.teacher import Teacher

NOISE = torch.randn(8, L, C, generator=seeded(0))
IDS = torch.randint(V, (8, L), generator=seeded(1))
LABELS = torch.arange(8) % 2


@pytest.fixture(scope="module")
def features() -> FeatureNetwork:
    network = FeatureNetwork(widths=(4, 8), blocks=1, num_classes=4)
    scramble(network, 7)
    return network.eval().requires_grad_(False)


def loss_of(objective: StudentObjective, seed: int = 0, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return objective(NOISE, IDS, LABELS, generator=seeded(seed), **options)


def test_the_terms_are_their_formulas_and_add_up_by_weight(teacher: Teacher) -> None:
    student = make_student(teacher, starts=(0,))
    prediction = student.predict(NOISE, LABELS)
    cross_entropy = F.cross_entropy(prediction.logits_BLV.flatten(0, 1), IDS.flatten()).item()
    squared = (prediction.embeddings_BLC - student.codebook_VC[IDS]).square().sum(-1).mean().item()
    for logits, embeddings in ((1.0, 0.0), (0.0, 1.0), (0.3, 2.0)):
        loss, metrics = loss_of(StudentObjective(student, ObjectiveConfig(logits=logits, embeddings=embeddings)))
        assert loss.item() == pytest.approx(logits * cross_entropy + embeddings * squared, rel=1e-4)
        assert metrics["cross_entropy"].item() == pytest.approx(cross_entropy, rel=1e-4)
        assert metrics["embedding_error"].item() == pytest.approx(squared, rel=1e-4)
        accuracy = (prediction.logits_BLV.argmax(-1) == IDS).float().mean().item()
        assert metrics["accuracy"].item() == pytest.approx(accuracy)


def test_image_terms_add_up_by_weight(teacher: Teacher, features: FeatureNetwork) -> None:
    student = make_student(teacher, starts=(0,), split=6)
    base, _ = loss_of(StudentObjective(student, ObjectiveConfig(), features=features))
    config = ObjectiveConfig(perceptual=0.7, energy=0.2)
    loss, metrics = loss_of(StudentObjective(student, config, features=features))
    assert loss.item() - base.item() == pytest.approx(
        0.7 * metrics["perceptual"].item() + 0.2 * metrics["energy"].item(), rel=1e-3
    )
    sequence = student.emit(NOISE, LABELS, 0, L)
    with torch.no_grad():
        ours, theirs = (teacher.tokenizer.decode(x) for x in (sequence, student.codebook_VC[IDS]))
        expected = perceptual_distance(features, ours, theirs).mean()
    assert metrics["perceptual"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_few_images_are_enough_for_the_image_terms(teacher: Teacher, features: FeatureNetwork) -> None:
    student = make_student(teacher, starts=(0,), split=6)
    config = ObjectiveConfig(perceptual=1.0, image_batch=4)
    _, metrics = loss_of(StudentObjective(student, config, features=features))
    with torch.no_grad():
        ours = teacher.tokenizer.decode(student.emit(NOISE[:4], LABELS[:4], 0, L))
        theirs = teacher.tokenizer.decode(IDS[:4])
        expected = perceptual_distance(features, ours, theirs).mean()
    assert metrics["perceptual"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_image_terms_may_begin_late(teacher: Teacher, features: FeatureNetwork) -> None:
    objective = StudentObjective(make_student(teacher), ObjectiveConfig(perceptual={0.5: 1.0}), features=features)
    assert "perceptual" not in loss_of(objective, progress=0.4)[1]
    assert "perceptual" in loss_of(objective, progress=0.5)[1]


@pytest.mark.parametrize("kind", ["dd1", "wavefront"])
def test_the_own_prefix_is_what_sampling_in_two_steps_keeps(
    kind: str, teacher: Teacher, features: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every sample's prefix its own, the decoded batch is that of the plan with a second pass."""
    student = make_student(teacher, starts=(0, 4), split=L) if kind == "dd1" else make_wavefront_student(teacher)
    kept = student.starts[1]
    config = ObjectiveConfig(logits=0.0, energy=1.0, own_prefix=1.0)
    objective = StudentObjective(student, config, features=features)
    decoded = []
    look = objective.look
    monkeypatch.setattr(objective, "look", lambda codes: (decoded.append(codes), look(codes))[1])
    loss_of(objective)
    whole, first = student.emit(NOISE, LABELS, 0, L), student.emit(NOISE, LABELS, 0, kept)
    second = student.emit(torch.cat([first, NOISE[:, kept:]], 1), LABELS, kept, L)
    stopped = torch.cat([first, F.embedding(IDS, student.codebook_VC)[:, kept:]], 1)  # a wavefront's pass of its own
    ways = [whole, torch.cat([first, second], 1), *([stopped] if kind == "wavefront" else [])]
    made = [[torch.allclose(row, ours, atol=1e-5) for row, ours in zip(decoded[0], way, strict=True)] for way in ways]
    assert all(map(any, zip(*made, strict=True))) and all(map(any, made))


@pytest.mark.parametrize("kind", ["draft", "dd1"])
def test_a_process_without_an_own_prefix_makes_a_pass_that_nobody_reads(
    kind: str, teacher: Teacher, features: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_draft_student(teacher) if kind == "draft" else make_student(teacher)
    objective = StudentObjective(student, ObjectiveConfig(energy=1.0, own_prefix=0.5), features=features)
    monkeypatch.setattr("ddecode.objectives.student.any_of_all", lambda own_B: True)
    codes = F.embedding(IDS, student.codebook_VC)
    own, start = torch.zeros(len(IDS), dtype=torch.bool), torch.full((len(IDS),), student.starts[1])
    assert torch.equal(objective.first_pass(codes, NOISE, LABELS, own, start), codes)
    own[1] = True
    prefix, kept = objective.first_pass(codes, NOISE, LABELS, own, start), student.starts[1]
    assert torch.equal(prefix[1:2, :kept], student.emit(NOISE[1:2], LABELS[1:2], 0, kept))
    assert torch.equal(prefix[1, kept:], codes[1, kept:]) and torch.equal(prefix[0], codes[0])


def test_the_own_prefix_takes_no_part_in_the_cross_entropy(teacher: Teacher, features: FeatureNetwork) -> None:
    """Its targets would belong to another prefix: with it, only the samples that start from noise are counted."""
    student = make_student(teacher, starts=(0, 4), split=L)
    own = loss_of(StudentObjective(student, ObjectiveConfig(energy=1.0, own_prefix=1.0), features=features))[1]
    starts = torch.tensor([0, 4])[torch.randint(2, (8,), generator=seeded(0))]
    logits = student.predict(NOISE, LABELS).logits_BLV[starts == 0]
    expected = F.cross_entropy(logits.flatten(0, 1), IDS[starts == 0].flatten())
    assert own["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_image_terms_without_a_network_are_refused(student: Student) -> None:
    for config in (ObjectiveConfig(perceptual=1.0), ObjectiveConfig(energy=1.0)):
        with pytest.raises(ValueError, match="need a feature network"):
            StudentObjective(student, config)


@pytest.mark.parametrize("config", [ObjectiveConfig(embeddings=1.0), ObjectiveConfig(perceptual=1.0, energy=1.0)])
def test_gradients_reach_both_heads_the_input_and_the_indicator(
    config: ObjectiveConfig, teacher: Teacher, features: FeatureNetwork
) -> None:
    student = make_student(teacher, split=6)
    loss, _ = loss_of(StudentObjective(student, config, features=features))
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert not any(p.requires_grad for p in features.parameters())


def test_image_terms_alone_reach_the_logits_through_the_argmax(teacher: Teacher, features: FeatureNetwork) -> None:
    student = make_student(teacher, split=L)
    loss, _ = loss_of(StudentObjective(student, ObjectiveConfig(logits=0.0, perceptual=1.0), features=features))
    loss.backward()
    assert student.backbone.output.weight.grad.abs().max() > 0


def test_what_is_emitted_in_training_is_what_sampling_emits(teacher: Teacher) -> None:
    for split in (0, 6, L):
        student = make_student(teacher, split=split)
        prediction = student.predict(NOISE, LABELS)
        sequence = student.emitted(prediction, NOISE)
        torch.testing.assert_close(sequence, student.emit(NOISE, LABELS, 0, L), atol=1e-5, rtol=1e-4)


def test_resolved_positions_do_not_enter_the_loss(teacher: Teacher, features: FeatureNetwork) -> None:
    """With start 4 alone, noise before it is not read, and the heads' outputs there do not count."""
    student = make_student(teacher, starts=(4,), split=10)
    config = ObjectiveConfig(embeddings=1.0, perceptual=1.0, energy=1.0)
    objective = StudentObjective(student, config, features=features)
    loss, metrics = loss_of(objective)
    noise = NOISE.clone()
    noise[:, :4] += 5
    assert objective(noise, IDS, LABELS, generator=seeded(0))[0].item() == loss.item()

    sequence = torch.cat([student.codebook_VC[IDS[:, :4]], NOISE[:, 4:]], 1)
    prediction = student.predict(sequence, LABELS, start=4)
    expected = F.cross_entropy(prediction.logits_BLV[:, 4:].flatten(0, 1), IDS[:, 4:].flatten())
    assert metrics["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-4)
    gaps = (prediction.embeddings_BLC - student.codebook_VC[IDS]).square().sum(-1)
    assert metrics["embedding_error"].item() == pytest.approx(gaps[:, 4:].mean().item(), rel=1e-4)
    emitted_BLC = torch.cat([sequence[:, :4], student.emit(sequence, LABELS, 4, L)], 1)
    with torch.no_grad():
        ours, theirs = (teacher.tokenizer.decode(x) for x in (emitted_BLC, student.codebook_VC[IDS]))
        gap = perceptual_distance(features, ours, theirs).mean()
    assert metrics["perceptual"].item() == pytest.approx(gap.item(), rel=1e-3)


def test_starts_are_drawn_from_the_generator_alone(teacher: Teacher) -> None:
    objective = StudentObjective(make_student(teacher, starts=(0, 4, 9)), ObjectiveConfig())
    losses = [loss_of(objective, seed=seed)[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_probabilities_as_targets_are_the_mean_over_tokens(teacher: Teacher) -> None:
    student = make_draft_student(teacher)
    log_probs = torch.randn(8, L, V, generator=seeded(4)).mul(2).log_softmax(-1)
    objective = StudentObjective(student, ObjectiveConfig(targets="probabilities", drafts=0.0))
    loss, metrics = objective(NOISE, IDS, LABELS, log_probs, generator=seeded(0))
    hard = StudentObjective(student, ObjectiveConfig(drafts=0.0))
    draws = []
    for seed in range(200):
        ids = torch.distributions.Categorical(logits=log_probs).sample() if seed else IDS
        starts_from_tokens = torch.where(torch.arange(L) < 4, IDS, ids)  # what a start keeps must stay the same
        draws.append(hard(NOISE, starts_from_tokens, LABELS, generator=seeded(0))[0].item())
    assert loss.item() == pytest.approx(sum(draws[1:]) / 199, rel=0.02)
    assert 0 < metrics["divergence"].item() < loss.item()


def test_the_divergence_vanishes_at_the_teacher(teacher: Teacher) -> None:
    student = make_draft_student(teacher)
    start_B = torch.zeros(8, dtype=torch.long)
    objective = StudentObjective(student, ObjectiveConfig(targets="probabilities", drafts=0.0))
    objective.starts = torch.zeros(1, dtype=torch.long)
    own = student(NOISE, LABELS, start_B).logits_BLV.log_softmax(-1).detach()
    loss, metrics = objective(NOISE, IDS, LABELS, own, generator=seeded(0))
    loss.backward()
    assert metrics["divergence"].item() == pytest.approx(0, abs=1e-5)
    assert max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None) < 1e-6


def test_fresh_noise_goes_with_the_tokens_and_never_repeats(teacher: Teacher) -> None:
    student = make_student(teacher, starts=(0,))
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    log_probs = torch.randn(8, L, V, generator=seeded(4)).log_softmax(-1)
    objective = StudentObjective(student, ObjectiveConfig(fresh_noise=True))
    for seed in (0, 0, 1):
        objective(NOISE, IDS, LABELS, log_probs, generator=seeded(seed))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    back = noise_to_tokens(seen[0], log_probs, student.codebook_VC, 32)
    assert (back == IDS).float().mean() > 0.9


def test_a_token_that_the_forced_pass_leaves_out_keeps_its_noise(teacher: Teacher) -> None:
    student = make_student(teacher, starts=(0,))
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    log_probs = torch.randn(8, L, V, generator=seeded(4)).log_softmax(-1)
    log_probs[2, 3, IDS[2, 3]] = -torch.inf
    StudentObjective(student, ObjectiveConfig(fresh_noise=True))(NOISE, IDS, LABELS, log_probs, generator=seeded(0))
    kept = (seen[0] == NOISE).all(-1)
    assert kept.nonzero().tolist() == [[2, 3]] and seen[0].isfinite().all()


def test_the_cross_entropy_by_step_is_its_mean_over_what_counts() -> None:
    teacher = make_var_teacher()
    student, steps = make_draft_student(teacher, starts=(0, 5)), teacher.steps
    noise = torch.randn(8, sum(steps), C, generator=seeded(0))
    ids = torch.randint(V, (8, sum(steps)), generator=seeded(1))
    objective = StudentObjective(student, ObjectiveConfig())
    _, metrics = objective(noise, ids, LABELS, generator=seeded(2))
    start = torch.tensor([0, 5])[torch.randint(2, (8,), generator=seeded(2))]
    sequence = torch.where(torch.arange(sum(steps))[:, None] >= start[:, None, None], noise, student.codebook_VC[ids])
    with torch.no_grad():
        logits = student(sequence, LABELS, start).logits_BLV
    each = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    assert 0 < (start == 0).sum() < 8 and metrics["cross_entropy_K"].shape == (3,)
    first, second, _ = (part.mean() for part in each[start == 0].split(list(steps), 1))
    torch.testing.assert_close(metrics["cross_entropy_K"], torch.stack([first, second, each[:, 5:].mean()]))


def test_steps_of_one_token_are_positions() -> None:
    values = torch.randn(4)
    assert torch.equal(by_step(values, (1, 1, 1, 1)), values)
    torch.testing.assert_close(by_step(values, (1, 3)), torch.stack([values[0], values[1:].mean()]))
