"""Token matching: its loss against the formula, where its gradients go, and toys whose distribution is known.

B batch, L positions, V codes.
"""

from typing import Any

import pytest
import torch
from table_teacher import CODES, JOINT, Generator, TableBackbone, draw_ids, frequencies, table_teacher, total_variation
from tiny import make_draft_student, make_student, make_teacher, make_var_teacher, scramble, seeded
from torch import Tensor

from ddecode.codebook import nearest_code
from ddecode.objective_config import MatchingConfig, ObjectiveConfig
from ddecode.objectives.guidance import TokenGuidance
from ddecode.objectives.matching import TokenMatching
from ddecode.objectives.posterior import noisy_codes, posterior_mean
from ddecode.objectives.student import StudentObjective
from ddecode.teacher import Recipe, Teacher
from ddecode.trajectory import resolve

OTHER = JOINT.T.contiguous() * 0.5 + 0.5 / 9
LABELS = torch.zeros(64, dtype=torch.int64)
OPEN = torch.ones(64, 2, dtype=torch.bool)


def term_of(joint_VV: Tensor, guessed_VV: Tensor, **options: float) -> TokenMatching:
    """The term of one teacher whose guidance network is another."""
    guidance = TokenGuidance.from_teacher(table_teacher(guessed_VV, CODES), passes=2)
    return TokenMatching(table_teacher(joint_VV, CODES), guidance, **options)


def conditionals(joint_VV: Tensor, ids_BL: Tensor) -> Tensor:
    """log p of each token given the one before, [B,2,V]."""
    first_V, second_VV = joint_VV.sum(1), joint_VV / joint_VV.sum(1, keepdim=True)
    return torch.stack([first_V.expand(len(ids_BL), -1), second_VV[ids_BL[:, 0]]], 1).log()


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_losses_are_their_formulas(temperature: float) -> None:
    ids = draw_ids(JOINT, 64, seeded(0))
    logits = torch.randn(64, 2, 3, generator=seeded(1)).requires_grad_()
    term = term_of(JOINT, OTHER, temperature=temperature, clip=1.5)
    loss, error, metrics = term(logits, ids, LABELS, OPEN, LABELS)
    ours, theirs = conditionals(OTHER, ids), conditionals(JOINT, ids)
    ratio = (ours - theirs).clamp(-1.5, 1.5)
    weights = (logits.detach() / temperature).softmax(-1)
    torch.testing.assert_close(loss.detach(), (weights * ratio).sum(-1).mean())
    torch.testing.assert_close(error.detach(), -ours.gather(-1, ids[..., None]).mean())
    torch.testing.assert_close(metrics["matching_gap"], (ours.exp() * (ours - theirs.clamp(min=-20))).sum(-1).mean())
    torch.testing.assert_close(metrics["guidance_cross_entropy"], error.detach())
    torch.testing.assert_close(metrics["teacher_cross_entropy"], -theirs.gather(-1, ids[..., None]).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    centred = ratio - (weights * ratio).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, weights * centred / temperature / 128)


def test_nothing_moves_a_student_that_equals_its_teacher() -> None:
    ids = draw_ids(OTHER, 64, seeded(0))
    logits = torch.randn(64, 2, 3, generator=seeded(1)).requires_grad_()
    loss, _, metrics = term_of(OTHER, OTHER)(logits, ids, LABELS, OPEN, LABELS)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and logits.grad is not None and logits.grad.abs().max() < 1e-7
    assert abs(metrics["matching_gap"].item()) < 1e-6


def test_each_side_has_its_own_gradients() -> None:
    ids, logits = draw_ids(JOINT, 64, seeded(0)), torch.zeros(64, 2, 3, requires_grad=True)
    term = term_of(JOINT, OTHER)
    loss, error, _ = term(logits, ids, LABELS, OPEN, LABELS)
    weights = [p for p in term.guidance.parameters() if p.requires_grad]
    assert all(g is None for g in torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))
    assert any(g is not None and g.any() for g in torch.autograd.grad(error, weights, allow_unused=True))
    assert torch.autograd.grad(loss, logits)[0].any() and not error.isnan()


def test_positions_that_are_closed_do_not_count() -> None:
    ids, logits = draw_ids(JOINT, 64, seeded(0)), torch.randn(64, 2, 3, generator=seeded(1)).requires_grad_()
    opened = OPEN.clone()
    opened[:, 0] = False
    loss, error, _ = term_of(JOINT, OTHER)(logits, ids, LABELS, opened, LABELS)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, 0].any() and gradient[:, 1].any()
    torch.testing.assert_close(error.detach(), -conditionals(OTHER, ids).gather(-1, ids[..., None])[:, 1].mean())
    closed = term_of(JOINT, OTHER)(logits, ids, LABELS, ~OPEN, LABELS)
    assert closed[0].item() == 0 and closed[1].item() == 0


def test_codes_that_the_teacher_excludes_stand_at_the_bound() -> None:
    teacher = make_teacher()
    scramble(teacher.backbone, 3)
    guidance = TokenGuidance.from_teacher(teacher, passes=1)
    term = TokenMatching(teacher, guidance, recipe=Recipe(top_k=2), clip=2.0)
    ids = teacher.generate([0, 1], generator=seeded(0))
    logits = torch.zeros(2, teacher.length, len(teacher.codebook_VC), requires_grad=True)
    labels, zeros = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64)
    loss, _, metrics = term(logits, ids, labels, torch.ones_like(ids, dtype=torch.bool), zeros)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and all(value.isfinite() for value in metrics.values())
    kept = teacher.log_probs(ids, labels, Recipe(top_k=2)).isfinite()
    assert gradient[~kept].min() > 0 and gradient[kept].max() < 0


def test_the_guidance_network_begins_as_its_teacher_and_tells_passes_apart() -> None:
    for teacher in (make_teacher(), make_var_teacher()):
        scramble(teacher.backbone, 3)
        guidance = TokenGuidance.from_teacher(teacher, passes=2)
        ids, labels = teacher.generate([0, 1], generator=seeded(0)), torch.tensor([0, 1])
        logits = guidance(ids, labels, torch.tensor([0, 1]))
        torch.testing.assert_close(logits.detach(), teacher.logits(ids, labels), atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            guidance.passes.weight[1] += torch.randn(teacher.backbone.width, generator=seeded(1))
        moved = guidance(ids, labels, torch.tensor([0, 1]))
        torch.testing.assert_close(moved[0], logits[0], atol=1e-5, rtol=1e-4)
        assert (moved[1] - logits[1]).abs().max() > 1e-3
        assert any(p.requires_grad for p in guidance.backbone.parameters())


def test_what_it_says_of_noisy_codes_is_exact_for_its_probabilities() -> None:
    guidance, ids = TokenGuidance.from_teacher(table_teacher(OTHER, CODES), passes=1), draw_ids(JOINT, 64, seeded(0))
    codes = CODES[ids].requires_grad_()
    noisy = noisy_codes(codes, 3, seeded(1))
    means = guidance.posterior_means(ids, LABELS, noisy, CODES)
    torch.testing.assert_close(means, posterior_mean(noisy.x_RBLC, noisy.time_RBL, conditionals(OTHER, ids), CODES))
    weights = [*guidance.parameters()]
    assert all(g is None for g in torch.autograd.grad(means.sum(), weights, retain_graph=True, allow_unused=True))
    assert torch.autograd.grad(means.square().sum(), codes)[0].any()
    errors = guidance.errors(ids, LABELS, codes, noisy)
    torch.testing.assert_close(errors.detach(), -conditionals(OTHER, ids).gather(-1, ids[..., None])[..., 0])
    assert any(g is not None and g.any() for g in torch.autograd.grad(errors.sum(), weights, allow_unused=True))


@pytest.mark.parametrize("make", [make_teacher, make_var_teacher])
def test_it_samples_as_the_teacher_that_it_is(make: Any) -> None:
    teacher: Teacher = make()
    scramble(teacher.backbone, 3)
    noise = torch.randn(3, teacher.length, teacher.codebook_VC.shape[1], generator=seeded(1))
    labels = torch.tensor([0, 2, 1])
    ids = TokenGuidance.from_teacher(teacher, passes=2).sample(noise, labels, teacher.codebook_VC, 8)
    assert torch.equal(ids, resolve(teacher, noise, labels, num_steps=8))


def matched(joint_VV: Tensor, codebook_VC: Tensor, steps: int) -> Generator:
    """A generator of codes trained by the term alone, its guidance network beside it."""
    teacher, noise = table_teacher(joint_VV, codebook_VC), seeded(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Generator(codebook_VC, emits_codes=True)
    guidance = TokenGuidance.from_teacher(teacher, passes=1)
    assert isinstance(guidance.backbone, TableBackbone)
    guidance.backbone.table.data.clamp_(min=-5)  # the student begins with what its teacher never does
    term = TokenMatching(teacher, guidance, temperature=0.5)
    assert total_variation(student.ids(20_000), joint_VV) > 0.35
    groups = [{"params": student.parameters()}, {"params": guidance.parameters(), "lr": 5e-2}]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.5, 0.95))
    labels, open_BL = torch.zeros(256, dtype=torch.int64), torch.ones(256, 2, dtype=torch.bool)
    for step in range(steps):  # at first the guidance network learns alone
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 2 * (1 - step / steps)) * (step >= 30)
        logits = student.logits(torch.randn(256, 2, codebook_VC.shape[1], generator=noise))
        loss, error, _ = term(logits, logits.argmax(-1), labels, open_BL, labels)
        optimizer.zero_grad()
        (loss + error).backward()
        optimizer.step()
    return student


def test_two_points_in_one_step() -> None:
    """Of {(0,0), (1,1)} independent sampling gives all four; a generator must learn that its positions agree."""
    share = frequencies(matched(torch.eye(2) / 2, torch.tensor([[-1.0], [1.0]]), 300).ids(20_000), 2)
    assert share[0, 1] + share[1, 0] < 0.04, share
    assert abs(share[0, 0].item() - 0.5) < 0.07, share


def test_a_joint_distribution_in_one_step() -> None:
    assert total_variation(matched(JOINT, CODES, 300).ids(20_000), JOINT) < 0.06


@pytest.mark.parametrize("drafts", [False, True])
def test_the_guidance_network_learns_alone_before_the_term_begins(drafts: bool) -> None:
    teacher, objective, plain = objectives(drafts, starts=(0,))
    noise, ids, labels = batch_of(teacher)
    (early, metrics), (late, _) = (objective(noise, ids, labels, generator=seeded(2), progress=p) for p in (0.4, 0.5))
    assert {"matching_gap", "guidance_cross_entropy", "teacher_cross_entropy"} <= metrics.keys()
    student = list(objective.model.parameters())
    expected = gradients(plain(noise, ids, labels, generator=seeded(2))[0], student)
    for ours, theirs in zip(gradients(early, student), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert any((a - b).abs().max() > 1e-5 for a, b in zip(gradients(late, student), expected, strict=True))
    guidance = [p for p in objective.critics["token_guidance"].parameters() if p.requires_grad]
    assert any(g.any() for g in gradients(early, guidance)) and objective.critic_lr["token_guidance"] == 5e-4


@pytest.mark.parametrize("drafts", [False, True])
def test_only_sequences_without_the_teachers_tokens_count(drafts: bool) -> None:
    teacher, objective, _ = objectives(drafts, starts=(0, 6))
    noise, ids, labels = batch_of(teacher)
    _, metrics = objective(noise, ids, labels, generator=seeded(2), progress=0.4)
    begun_B = torch.randint(2, (8,), generator=seeded(2))[:4]  # as the objective draws it
    assert begun_B.any() and not begun_B.all()
    emitted = nearest_code(objective.model.emit(noise[:4], labels[:4], 0, teacher.length), teacher.codebook_VC)
    log_probs = teacher.log_probs(emitted, labels[:4], teacher.recipe).gather(-1, emitted[..., None])[..., 0]
    expected = -log_probs.clamp(min=-20)[begun_B == 0].mean()
    torch.testing.assert_close(metrics["teacher_cross_entropy"], expected)


def test_a_missing_term_is_refused() -> None:
    teacher = make_teacher()
    with pytest.raises(ValueError, match=r"objective\.matching needs a matching term"):
        StudentObjective(make_student(teacher), ObjectiveConfig(matching=MatchingConfig(weight=1.0)))


def objectives(drafts: bool, starts: tuple[int, ...]) -> tuple[Teacher, StudentObjective, StudentObjective]:
    """Teacher, an objective whose term begins at half of the run, and one without."""
    teacher = make_teacher()
    scramble(teacher.backbone, 3)
    student = (make_draft_student if drafts else make_student)(teacher, starts=starts)
    guidance = TokenGuidance.from_teacher(teacher, passes=len(starts))
    config = ObjectiveConfig(matching=MatchingConfig(weight={0.5: 2.0}), image_batch=4)
    matching = TokenMatching(teacher, guidance)
    return teacher, StudentObjective(student, config, matching=matching), StudentObjective(student, ObjectiveConfig())


def batch_of(teacher: Teacher) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.tensor([0, 1] * 4)
    noise = torch.randn(8, teacher.length, teacher.codebook_VC.shape[1], generator=seeded(0))
    return noise, teacher.generate(labels, generator=seeded(1)), labels


def gradients(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
