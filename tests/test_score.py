"""DD2's objectives: posterior means against closed forms, the second stage on toys whose distribution is known.

R noise draws, B batch, L positions, V codes, C code width.
"""

import math
from typing import Any, Literal

import pytest
import torch
from table_teacher import (
    CODES,
    JOINT,
    AnalyticGuidance,
    Generator,
    TableBackbone,
    draw_ids,
    frequencies,
    table_teacher,
    total_variation,
)  # fmt: skip
from tiny import make_scale_teacher, make_student, make_teacher, make_var_teacher, scramble, seeded
from torch import Tensor, nn

from ddecode.codebook import nearest_code
from ddecode.flow import Codes, augmented
from ddecode.objective_config import ObjectiveConfig, ScoreConfig
from ddecode.objectives import posterior
from ddecode.objectives.guidance import ARDiffusion, Guidance, TokenGuidance
from ddecode.objectives.posterior import LEAST_TIME, noisy_codes, posterior_mean, score, score_identity, velocity
from ddecode.objectives.score import ScoreTerm
from ddecode.objectives.student import StudentObjective
from ddecode.objectives.tuning import TuningObjective
from ddecode.teacher import Recipe, Teacher

TIMES = (1.0, 0.9, 0.5, 0.1, 0.02, 1e-3)
FORMS = pytest.mark.parametrize("form", ["dmd", "sid"])


def problem(time: float, V: int = 40, C: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy codes [2,3,5,C], times, log-probabilities [3,5,V] of which half are -inf, and a codebook off the origin."""
    codebook = torch.randn(V, C, generator=seeded(0)) + 2
    log_probs = (2 * torch.randn(3, 5, V, generator=seeded(1))).log_softmax(-1)
    log_probs = log_probs.masked_fill(torch.rand(3, 5, V, generator=seeded(2)) < 0.5, -math.inf)
    codes = codebook[torch.distributions.Categorical(logits=log_probs).probs.argmax(-1)]
    time_RBL = torch.full((2, 3, 5), time)
    x = (1 - time) * codes + time * torch.randn(2, 3, 5, C, generator=seeded(3))
    return x, time_RBL, log_probs, codebook


def brute_force(x: Tensor, time: Tensor, log_probs: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-density, code by code in float64."""
    t = time.double()[..., None]
    gaps = (x.double()[..., None, :] - (1 - t)[..., None] * codebook.double()).square().sum(-1)
    exponents = log_probs.double() - gaps / (2 * t.square())
    return exponents.softmax(-1) @ codebook.double(), exponents.logsumexp(-1)


@pytest.mark.parametrize("time", TIMES)
def test_the_posterior_mean_is_its_formula(time: float) -> None:
    x, time_RBL, log_probs, codebook = problem(time)
    expected, _ = brute_force(x, time_RBL, log_probs, codebook)
    mean = posterior_mean(x, time_RBL, log_probs, codebook)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(posterior_mean(x[0], time_RBL[0], log_probs, codebook), mean[0])


def test_the_posterior_mean_of_pure_noise_is_the_mean_code() -> None:
    x, time_RBL, log_probs, codebook = problem(1.0)
    mean = posterior_mean(x, time_RBL, log_probs, codebook)
    torch.testing.assert_close(mean, (log_probs.softmax(-1) @ codebook).expand_as(mean))
    assert velocity(x, mean, time_RBL).isfinite().all() and score(x, mean, time_RBL).isfinite().all()


def test_the_posterior_mean_of_hardly_any_noise_is_the_code_beneath() -> None:
    x, time_RBL, log_probs, codebook = problem(1e-5)
    mean = posterior_mean(x, time_RBL, log_probs, codebook)
    torch.testing.assert_close(mean, codebook[nearest_code(x, codebook)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("time", TIMES[:4])
def test_the_score_is_the_gradient_of_the_log_density(time: float) -> None:
    x, time_RBL, log_probs, codebook = problem(time)
    at = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(brute_force(at, time_RBL, log_probs, codebook)[1].sum(), at)
    mean = posterior_mean(x, time_RBL, log_probs, codebook)
    ours = score(x, mean, time_RBL)
    torch.testing.assert_close(ours.double(), expected, atol=1e-3 / time, rtol=1e-4)
    if time < 1:  # the paper's form of the velocity, 0/0 at 1
        papers = -(time * ours + x) / (1 - time)
        torch.testing.assert_close(velocity(x, mean, time_RBL), papers, atol=1e-3 / time, rtol=1e-3)


@pytest.mark.parametrize("time", TIMES[:5])
def test_the_posterior_mean_is_that_of_the_noise_to_token_map(time: float) -> None:
    x, time_RBL, log_probs, codebook = problem(time)
    rows = Codes(log_p_RA=log_probs.reshape(15, -1), codes=augmented(codebook))
    z, s = x[0].reshape(15, -1) / time, (1 - time) / time
    mean = posterior_mean(x, time_RBL, log_probs, codebook)[0].reshape(15, -1)
    torch.testing.assert_close(mean, rows.mean(rows.weights(z, s)), atol=5e-4, rtol=1e-4)


def test_chunks_and_autocast_leave_the_posterior_mean_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x, time_RBL, log_probs, codebook = problem(0.3)
    whole = posterior_mean(x, time_RBL, log_probs, codebook)
    monkeypatch.setattr(posterior, "ROWS_TIMES_CODES", 4 * len(codebook))
    chunked = posterior_mean(x, time_RBL, log_probs, codebook)
    torch.testing.assert_close(chunked, whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(posterior_mean(x, time_RBL, log_probs, codebook), chunked)


def test_noisy_codes_are_their_formula_and_follow_from_the_generator() -> None:
    codes = torch.randn(5, 7, 3, generator=seeded(0))
    noisy = noisy_codes(codes, 400, seeded(1))
    t = noisy.time_RBL[..., None]
    torch.testing.assert_close(noisy.x_RBLC, (1 - t) * codes + t * noisy.noise_RBLC)
    assert t.shape == (400, 5, 7, 1) and t.min() >= LEAST_TIME and t.max() <= 1
    assert t.mean().item() == pytest.approx((1 + LEAST_TIME) / 2, abs=0.015)  # 6 standard errors
    assert torch.equal(noisy.x_RBLC, noisy_codes(codes, 400, seeded(1)).x_RBLC)


def test_score_identity_has_the_gradient_of_the_squared_difference() -> None:
    """A generator of +-theta against a teacher of +-1, by quadrature; D of codes +-a is a tanh((1-t) a x / t^2)."""
    time = 0.6
    eps = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    share = torch.softmax(-eps.square() / 2, 0)
    sign = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def mean(x: Tensor, a: Tensor | float) -> Tensor:
        return a * torch.tanh((1 - time) * a * x / time**2)

    def gradient(theta: float, kind: str, alpha: float = 0.5) -> float:
        at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        x = (1 - time) * at * sign + time * eps
        teacher, guidance = mean(x, 1.0), mean(x, at if kind == "exact" else theta)
        value = (teacher - guidance).square() / 2
        if kind == "score identity":
            value = score_identity((at * sign)[..., None], teacher[..., None], guidance[..., None], alpha)
        return torch.autograd.grad((value * share).sum() / 2, at)[0].item()

    for theta in (0.5, 0.8, 1.3):
        exact = gradient(theta, "exact")
        assert gradient(theta, "score identity") == pytest.approx(exact, rel=1e-9)
        assert gradient(theta, "score identity", 1.0) == pytest.approx(exact, rel=0.1)
        assert (exact < 0) == (theta < 1)
    assert gradient(0.5, "guidance held fixed") > 0 > gradient(0.5, "exact")
    assert gradient(1.0, "score identity", 1.0) == pytest.approx(0, abs=1e-12)


@FORMS
def test_the_generator_rests_where_its_posterior_means_are_the_teachers(form: Literal["dmd", "sid"]) -> None:
    teacher, other = table_teacher(JOINT, CODES), table_teacher(JOINT.T.contiguous() * 0.5 + 0.5 / 9, CODES)
    emitted = (CODES[draw_ids(JOINT, 64, seeded(0))] + 0.1).requires_grad_()
    open_BL = torch.ones(64, 2, dtype=torch.bool)
    for source, rests in ((teacher, True), (other, False)):
        term = ScoreTerm(teacher, AnalyticGuidance(source), form=form, draws=3)
        loss, metrics = term.student_loss(emitted, torch.zeros(64, dtype=torch.int64), open_BL, seeded(1))
        (gradient,) = torch.autograd.grad(loss, emitted)
        assert (64 * gradient.norm(dim=-1).mean().item() < 1e-5) == rests
        assert (metrics["score_gap"].item() < 1e-6) == rests


def test_the_dmd_gradient_is_the_difference_of_posterior_means() -> None:
    teacher, other = table_teacher(JOINT, CODES), table_teacher(JOINT.T.contiguous() * 0.5 + 0.5 / 9, CODES)
    emitted = (CODES[draw_ids(JOINT, 16, seeded(0))] + 0.1).requires_grad_()
    ids, labels = nearest_code(emitted.detach(), CODES), torch.zeros(16, dtype=torch.int64)
    open_BL = torch.rand(16, 2, generator=seeded(2)) < 0.5
    noisy = noisy_codes(emitted.detach(), 3, seeded(1))
    ours, theirs = (
        posterior_mean(noisy.x_RBLC, noisy.time_RBL, source.log_probs(ids, labels, Recipe()), CODES)
        for source in (teacher, other)
    )
    scale = (emitted.detach() - ours).abs().mean((0, 3))[open_BL].mean()
    expected = ((theirs - ours) / scale).mean(0) * open_BL[..., None] / open_BL.sum()
    term = ScoreTerm(teacher, AnalyticGuidance(other), draws=3)
    loss, metrics = term.student_loss(emitted, labels, open_BL, seeded(1))
    (gradient,) = torch.autograd.grad(loss, emitted)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    gap_BL = (theirs - ours).abs().mean((0, 3))
    torch.testing.assert_close(metrics["score_gap"], gap_BL[open_BL].mean())
    by_position = torch.stack([gap_BL[open_BL[:, i], i].mean() for i in range(2)])
    torch.testing.assert_close(metrics["score_gap_L"], by_position)


@FORMS
@pytest.mark.parametrize("make", [make_teacher, make_var_teacher, make_scale_teacher])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_go_where_they_belong(form: Literal["dmd", "sid"], make: Any, precision: torch.dtype) -> None:
    """Each loss reaches its own network alone, also when both are summed under one autocast."""
    teacher: Teacher = make()
    codebook, length = teacher.codebook_VC, teacher.length
    guidance = ARDiffusion.from_teacher(teacher, width=16, depth=2)
    scramble(guidance.head, 5)
    term = ScoreTerm(teacher, guidance, recipe=Recipe(guidance_scale=1.5, top_k=6), form=form, guidance_draws=2)
    emitted = codebook[torch.randint(12, (4, length), generator=seeded(0))]
    emitted = (emitted + 0.1 * torch.randn(emitted.shape, generator=seeded(1))).requires_grad_()
    labels, open_BL = torch.tensor([0, 1, 2, 0]), (torch.arange(length) >= 3).expand(4, -1)

    def run(student: bool, own: bool) -> dict[str, Tensor | None]:
        term.zero_grad()
        emitted.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = torch.zeros(())
            if student:
                loss = loss + term.student_loss(emitted, labels, open_BL, seeded(2))[0]
            if own:
                loss = loss + term.guidance_loss(emitted, labels, seeded(3), open_BL)[0]
        loss.backward()
        return {name: p.grad for name, p in (*guidance.named_parameters(), ("emitted", emitted))}

    student, own, both = run(True, False), run(False, True), run(True, True)
    moved = student.pop("emitted")
    assert moved is not None and moved.isfinite().all()
    assert not moved[:, :3].any() and moved[:, 3:].abs().amax(-1).min() > 0
    assert all(gradient is None for gradient in student.values())
    assert own.pop("emitted") is None
    torch.testing.assert_close(both.pop("emitted"), moved)
    for name, gradient in own.items():
        torch.testing.assert_close(both[name], gradient, msg=name)
        if gradient is None:  # the logit head, and passes that it was not told of
            assert name.startswith(("backbone.norm.", "backbone.output.", "backbone.head", "passes."))
    assert sum(gradient is not None and bool(gradient.any()) for gradient in own.values()) > 10
    assert all(p.grad is None for p in teacher.backbone.parameters())


def test_nothing_open_is_no_loss_and_too_few_draws_are_refused() -> None:
    teacher = table_teacher(JOINT, CODES)
    guidance = ARDiffusion.from_teacher(teacher, width=8)
    emitted = CODES[draw_ids(JOINT, 4, seeded(0))].requires_grad_()
    closed, labels = torch.zeros(4, 2, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    loss, metrics = ScoreTerm(teacher, guidance).student_loss(emitted, labels, closed, seeded(0))
    loss.backward()
    assert loss.item() == 0 and not emitted.grad.any() and not metrics["score_gap_L"].any()
    assert ScoreTerm(teacher, guidance).guidance_loss(emitted, labels, seeded(0), closed)[0].item() == 0
    with pytest.raises(ValueError, match="draws must be at least 1"):
        TuningObjective(teacher, guidance, draws=0)
    with pytest.raises(ValueError, match="draws and guidance_draws must be at least 1"):
        ScoreTerm(teacher, guidance, guidance_draws=0)


def distilled(
    joint_VV: Tensor, codebook_VC: Tensor, *, emits_codes: bool, steps: int, tokens: bool = False, **options: Any
) -> Generator:
    """The second stage from fresh networks, both losses in one backward pass."""
    teacher, noise = table_teacher(joint_VV, codebook_VC), seeded(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Generator(codebook_VC, emits_codes=emits_codes)
        guidance: Guidance = ARDiffusion.from_teacher(teacher, width=32, depth=2)
    if tokens:
        guidance = TokenGuidance.from_teacher(teacher, passes=1)
        assert isinstance(guidance.backbone, TableBackbone)
        guidance.backbone.table.data.clamp_(min=-5)  # the student begins with what its teacher never does
    term = ScoreTerm(teacher, guidance, guidance_draws=2, **options)
    before = total_variation(student.ids(20_000), joint_VV)
    assert before > 0.35
    rates = {2e-3: student.parameters(), 5e-2 if tokens else 5e-3: guidance.parameters()}
    groups = [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.95))
    labels, open_BL = torch.zeros(128, dtype=torch.int64), torch.ones(128, 2, dtype=torch.bool)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, 2 * (1 - step / steps))
        emitted = student(torch.randn(128, 2, codebook_VC.shape[1], generator=noise))
        loss, _ = term.student_loss(emitted, labels, open_BL, noise)
        optimizer.zero_grad()
        (loss + term.guidance_loss(emitted, labels, noise)[0]).backward()
        optimizer.step()
    return student


@FORMS
@pytest.mark.parametrize("emits_codes", [False, True])
def test_two_points_in_one_step(form: Literal["dmd", "sid"], emits_codes: bool) -> None:
    """Of {(0,0), (1,1)} independent sampling gives all four; a generator must learn that its positions agree."""
    joint, codes = torch.eye(2) / 2, torch.tensor([[-1.0], [1.0]])
    student = distilled(joint, codes, emits_codes=emits_codes, steps=250, form=form)
    share = frequencies(student.ids(20_000), 2)
    # a continuous map between the two points must cross over somewhere
    assert share[0, 1] + share[1, 0] < 0.04, share
    assert abs(share[0, 0].item() - 0.5) < 0.07, share


@pytest.mark.parametrize("tokens", [False, True])
def test_a_joint_distribution_in_one_step(tokens: bool) -> None:
    student = distilled(JOINT, CODES, emits_codes=True, steps=300, draws=2, tokens=tokens)
    assert total_variation(student.ids(20_000), JOINT) < 0.06


def test_two_points_in_one_step_by_the_probabilities_of_tokens() -> None:
    student = distilled(torch.eye(2) / 2, torch.tensor([[-1.0], [1.0]]), emits_codes=True, steps=250, tokens=True)
    share = frequencies(student.ids(20_000), 2)
    assert share[0, 1] + share[1, 0] < 0.04 and abs(share[0, 0].item() - 0.5) < 0.07, share


@FORMS
def test_a_generator_that_equals_its_teacher_rests_at_once(form: Literal["dmd", "sid"]) -> None:
    """A guidance network of tokens begins as the unguided teacher: there nothing has to be learned before."""
    teacher = make_teacher()
    scramble(teacher.backbone, 3)
    emitted = teacher.codebook_VC[teacher.generate([0, 1], generator=seeded(0))].requires_grad_()
    guidance = TokenGuidance.from_teacher(teacher, passes=1)
    term = ScoreTerm(teacher, guidance, recipe=Recipe(), form=form)
    open_BL = torch.ones(2, teacher.length, dtype=torch.bool)
    loss, metrics = term.student_loss(emitted, torch.tensor([0, 1]), open_BL, seeded(1))
    (gradient,) = torch.autograd.grad(loss, emitted)
    assert gradient.abs().max() < 1e-4 and metrics["score_gap"] < 1e-5


def test_the_guidance_network_learns_alone_before_the_term_begins() -> None:
    teacher = make_teacher()
    student = make_student(teacher, starts=(0,))
    config = ObjectiveConfig(score=ScoreConfig(weight={0.5: 2.0}), image_batch=4)
    objective = StudentObjective(student, config, score=ScoreTerm(teacher, TokenGuidance.from_teacher(teacher, 1)))
    plain = StudentObjective(student, ObjectiveConfig())
    ids = teacher.generate(labels := torch.tensor([0, 1] * 4), generator=seeded(1))
    batch = torch.randn(8, teacher.length, teacher.codebook_VC.shape[1], generator=seeded(0)), ids, labels

    def gradients(ours: StudentObjective, of: nn.Module, progress: float) -> Tensor:
        loss, _ = ours(*batch, generator=seeded(2), progress=progress)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, [*of.parameters()], allow_unused=True) if g is not None]
        )

    early, late = (gradients(objective, student, progress) for progress in (0.4, 0.5))
    torch.testing.assert_close(early, gradients(plain, student, 0.4))
    assert (early - late).abs().max() > 1e-5
    assert gradients(objective, objective.critics["guidance"], 0.4).any()


def test_the_student_goes_back_to_its_average_only_where_the_term_is_on() -> None:
    teacher = make_teacher()
    config = ObjectiveConfig(score=ScoreConfig(weight={0.5: 2.0}, align_every=4, align_steps=1))
    term = ScoreTerm(teacher, ARDiffusion.from_teacher(teacher))
    objective = StudentObjective(make_student(teacher), config, score=term)
    assert [objective.realigns(step, step / 16) for step in (0, 4, 7, 8, 9, 12)] == [
        False,
        False,
        False,
        True,
        False,
        True,
    ]
