"""DD2's objectives: posterior means against closed forms, both stages on toys whose distribution is known.

R noise draws, B batch, L positions, V codes, C code width.
"""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny import ScaleTokenizer, make_scale_teacher, make_teacher, make_var_teacher, scramble, seeded
from torch import Tensor, nn

from ddecode.codebook import nearest_code
from ddecode.config import TrainingConfig
from ddecode.flow import Codes
from ddecode.objectives import score as score_module
from ddecode.objectives.score import (
    LEAST_TIME,
    ARDiffusion,
    ScoreTerm,
    TuningObjective,
    noisy_codes,
    posterior_mean,
    score,
    score_identity,
    velocity,
)
from ddecode.teacher import Recipe, Teacher
from ddecode.training import train
from ddecode.trajectory import resolve
from ddecode.types import Condition, KeyValueCache

CODES = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.6, -0.7]])
JOINT = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.0], [0.0, 0.10, 0.20]])
"""Of two tokens; drawing each from its marginal is 0.415 away from it in total variation."""
TIMES = (1.0, 0.9, 0.5, 0.1, 0.02, 1e-3)
FORMS = pytest.mark.parametrize("form", ["dmd", "sid"])
TEACHERS = pytest.mark.parametrize("make", [make_teacher, make_var_teacher, make_scale_teacher])


class TableBackbone(nn.Module):
    """A `Backbone` of two tokens with any joint distribution: a hidden state says which token came before."""

    steps, depth, num_classes = (1, 1), 1, 1

    def __init__(self, joint_VV: Tensor) -> None:
        super().__init__()
        self.vocab_size, self.width = len(joint_VV), len(joint_VV) + 1
        self.table = nn.Parameter(torch.cat([joint_VV.sum(1)[None], joint_VV / joint_VV.sum(1, keepdim=True)]).log())

    def condition(self, labels: Tensor) -> Condition:
        return Condition(prefix_BPD=torch.eye(self.width)[torch.zeros_like(labels)][:, None])

    def unconditional(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.num_classes)

    def null_labels(self, batch: int) -> Tensor:
        return torch.full((batch,), self.num_classes)

    def guidance_weight(self, scale: float, step: int) -> float:
        return scale

    def token_inputs(self, ids_BN: Tensor, seen: int = 0) -> Tensor:
        return torch.eye(self.width)[ids_BN + 1][:, seen:]

    def vector_inputs(self, sequence_BLC: Tensor) -> Tensor:
        raise NotImplementedError

    def student_state(self, teacher: Any, codebook_VC: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def new_cache(self, batch: int) -> KeyValueCache:
        return KeyValueCache(0, (batch, 1, 0, 1), device="cpu", dtype=torch.float32)

    def hidden(self, inputs_BND: Tensor, condition: Any, *, cache: Any = None, residuals: Any = None) -> Tensor:
        return inputs_BND

    def logits(self, hidden_BND: Tensor, condition: Any) -> Tensor:
        return self.table[hidden_BND.argmax(-1)]


def table_teacher(joint_VV: Tensor, codebook_VC: Tensor) -> Teacher:
    tokenizer = ScaleTokenizer(0)
    tokenizer.codebook_VC = codebook_VC
    return Teacher(TableBackbone(joint_VV), tokenizer, family="toy")


def labels_of(ids_BL: Tensor) -> Tensor:
    return torch.zeros(len(ids_BL), dtype=torch.int64)


def draw_ids(joint_VV: Tensor, count: int, generator: torch.Generator) -> Tensor:
    drawn = torch.multinomial(joint_VV.flatten(), count, True, generator=generator)
    return torch.stack([drawn // len(joint_VV), drawn % len(joint_VV)], 1)


def frequencies(ids_BL: Tensor, V: int) -> Tensor:
    return torch.bincount(ids_BL[:, 0] * V + ids_BL[:, 1], minlength=V * V).view(V, V) / len(ids_BL)


def total_variation(ids_BL: Tensor, joint_VV: Tensor) -> float:
    return (frequencies(ids_BL, len(joint_VV)) - joint_VV).abs().sum().item() / 2


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
    rows = Codes.shared(codebook, log_probs.reshape(15, -1))
    z, s = x[0].reshape(15, -1) / time, (1 - time) / time
    mean = posterior_mean(x, time_RBL, log_probs, codebook)[0].reshape(15, -1)
    torch.testing.assert_close(mean, rows.mean(rows.weights(z, s)), atol=5e-4, rtol=1e-4)


def test_chunks_and_autocast_leave_the_posterior_mean_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x, time_RBL, log_probs, codebook = problem(0.3)
    whole = posterior_mean(x, time_RBL, log_probs, codebook)
    monkeypatch.setattr(score_module, "ROWS_TIMES_CODES", 4 * len(codebook))
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


@TEACHERS
def test_guidance_sees_tokens_of_earlier_steps_alone(make: Any) -> None:
    teacher: Teacher = make()
    guidance = ARDiffusion.from_teacher(teacher, width=16, depth=2)
    scramble(guidance.head, 5)
    ids = torch.randint(12, (2, teacher.length), generator=seeded(1))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 12
    noisy = noisy_codes(teacher.codebook_VC[ids], 3, seeded(2))
    labels = torch.tensor([0, 1])
    ours, others = (guidance(i, labels, noisy.x_RBLC, noisy.time_RBL) for i in (ids, changed))
    assert ours.shape == noisy.x_RBLC.shape and ours.dtype == torch.float32
    ends = [sum(teacher.steps[: k + 1]) for k in range(len(teacher.steps))]
    first = next(end for end in ends if end > 5)
    difference = (ours - others).abs().amax((0, 1, 3))
    assert not difference[:first].any()
    assert first == teacher.length or difference[first:].min() > 1e-5
    other_label = guidance(ids, torch.tensor([2, 1]), noisy.x_RBLC, noisy.time_RBL)
    assert (ours - other_label)[:, 0].abs().amax((0, 2)).min() > 1e-5
    one_draw = guidance(ids, labels, noisy.x_RBLC[1], noisy.time_RBL[1])
    torch.testing.assert_close(one_draw, ours[1], atol=1e-5, rtol=1e-5)


def test_guidance_is_a_trainable_copy_that_shares_the_tokenizer() -> None:
    teacher = make_var_teacher()
    teacher.backbone.requires_grad_(False)
    guidance = ARDiffusion.from_teacher(teacher)
    assert guidance.backbone.tokenizer is teacher.tokenizer
    theirs = dict(teacher.backbone.named_parameters())
    for name, parameter in guidance.backbone.named_parameters():
        assert parameter.requires_grad and not theirs[name].requires_grad, name
        assert torch.equal(parameter, theirs[name]) and parameter.data_ptr() != theirs[name].data_ptr(), name


class AnalyticHead(nn.Module):
    """Velocities of a teacher whose log-probabilities stand where features would, less a constant."""

    def __init__(self, codebook_VC: Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.codebook_VC, self.offset = codebook_VC, offset

    def forward(self, log_probs_BLV: Tensor, x_RBLC: Tensor, time_RBL: Tensor) -> Tensor:
        mean = posterior_mean(x_RBLC, time_RBL, log_probs_BLV, self.codebook_VC)
        return velocity(x_RBLC, mean, time_RBL) - self.offset


class AnalyticGuidance(ARDiffusion):
    """The guidance network of a generator that samples as `teacher` does."""

    def __init__(self, teacher: Teacher, offset: float = 0.0) -> None:
        super().__init__(teacher.backbone, teacher.codebook_VC)
        self.teacher, self.head = teacher, AnalyticHead(teacher.codebook_VC, offset)

    def features(self, ids_BL: Tensor, labels: Any) -> Tensor:
        return self.teacher.log_probs(ids_BL, labels, Recipe())


def test_both_targets_of_the_first_stage_have_the_same_mean() -> None:
    """The exact velocity has no analytic error; a constant more costs its square under either target."""
    teacher = table_teacher(JOINT, CODES)
    ids = draw_ids(JOINT, 4000, seeded(0))
    losses = {
        (target, offset): TuningObjective(teacher, AnalyticGuidance(teacher, offset), target=target, draws=2)(
            torch.zeros(4000, 2, 2), ids, labels_of(ids), seeded(1)
        )[0].item()
        for target in ("analytic", "monte_carlo")
        for offset in (0.0, 0.5)
    }
    assert losses["analytic", 0.0] == pytest.approx(0, abs=1e-9)
    assert losses["analytic", 0.5] == pytest.approx(0.25, abs=1e-5)
    assert losses["monte_carlo", 0.0] > 0.2
    # 32 000 errors of variance below 1: the cross term's standard error is below 0.006
    assert losses["monte_carlo", 0.5] - losses["monte_carlo", 0.0] == pytest.approx(0.25, abs=0.025)


@pytest.fixture(scope="module")
def tuned() -> ARDiffusion:
    """The first stage on JOINT."""
    teacher, generator = table_teacher(JOINT, CODES), seeded(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ARDiffusion.from_teacher(teacher, width=48, depth=2)
    objective = TuningObjective(teacher, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps := 300):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        ids = draw_ids(JOINT, 96, generator)
        loss, _ = objective(torch.zeros(96, 2, 2), ids, labels_of(ids), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_the_first_stage_learns_the_teachers_posterior_means(tuned: ARDiffusion) -> None:
    teacher, ids = table_teacher(JOINT, CODES), draw_ids(JOINT, 2000, seeded(1))
    log_probs = teacher.log_probs(ids, labels_of(ids), Recipe())
    for time in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0):
        time_BL = torch.full((2000, 2), time)
        x = (1 - time) * CODES[ids] + time * torch.randn(2000, 2, 2, generator=seeded(2))
        ours = x - time * tuned(ids, labels_of(ids), x, time_BL)
        error = (ours - posterior_mean(x, time_BL, log_probs, CODES)).square().mean().sqrt().item()
        assert error < 0.1 * CODES.std().item(), (time, error)


def test_the_first_stage_samples_the_teachers_joint_distribution(tuned: ARDiffusion) -> None:
    ids = tuned.sample(torch.randn(4000, 2, 2, generator=seeded(3)), torch.zeros(4000, dtype=torch.int64), CODES)
    assert total_variation(ids, JOINT) < 0.05  # drawing 4000 from JOINT itself: 0.013 on average


def test_exact_velocities_send_noise_where_the_teachers_map_does() -> None:
    """The sampler and the map are solvers of one ODE; where they disagree, the noise lies between two codes."""
    teacher, noise = table_teacher(JOINT, CODES), torch.randn(2000, 2, 2, generator=seeded(0))

    class Head(nn.Module):
        def forward(self, hidden_BND: Tensor, x_BNC: Tensor, time_BN: Tensor) -> Tensor:
            log_probs = teacher.backbone.logits(hidden_BND, None)
            return velocity(x_BNC, posterior_mean(x_BNC, time_BN, log_probs, CODES), time_BN)

    guidance = ARDiffusion(teacher.backbone, CODES)
    guidance.head = Head()
    labels = torch.zeros(2000, dtype=torch.int64)
    mapped = resolve(teacher, noise, labels, num_steps=64)
    agreement = [(guidance.sample(noise, labels, CODES, n) == mapped).all(1).float().mean() for n in (4, 16, 64)]
    assert agreement[0] > 0.9 and agreement[1] > 0.97 and agreement[2] > 0.99, agreement


@TEACHERS
def test_sampling_the_guidance_network_equals_whole_passes(make: Any) -> None:
    """No cache: each AR step's tokens from the features that a pass over all of the sequence gives there."""
    teacher: Teacher = make()
    guidance = ARDiffusion.from_teacher(teacher, width=16, depth=2)
    scramble(guidance.head, 5)
    codebook, labels = teacher.codebook_VC, torch.tensor([0, 2, 1])
    noise = torch.randn(3, teacher.length, codebook.shape[1], generator=seeded(1))
    fast, slow = guidance.sample(noise, labels, codebook, 2), torch.zeros(3, teacher.length, dtype=torch.int64)
    begin = 0
    for count in teacher.steps:
        half, whole = (torch.full(noise.shape[:2], time) for time in (0.5, 1.0))
        with torch.no_grad():
            first = guidance(slow, labels, noise, whole)
            middle = noise - (first + guidance(slow, labels, noise - first / 2, half)) / 4
            end = middle - guidance(slow, labels, middle, half) / 2
        slow[:, begin : begin + count] = nearest_code(end, codebook)[:, begin : begin + count]
        begin += count
    assert torch.equal(fast, slow)


def test_the_first_stage_trains_in_the_common_loop(tmp_path: Path) -> None:
    teacher = make_var_teacher(recipe=Recipe(guidance_scale=1.5, top_k=8, top_p=0.9))

    class Pairs:
        def __len__(self) -> int:
            return 6

        def batch(self, indices: list[int]) -> tuple[Tensor, ...]:
            ids = torch.randint(32, (6, teacher.length), generator=seeded(0))[indices]
            return torch.zeros(len(indices), teacher.length, 8), ids, torch.tensor(indices) % 4

    before = {name: p.clone() for name, p in teacher.backbone.named_parameters()}
    objective = TuningObjective(teacher, ARDiffusion.from_teacher(teacher, width=16), draws=2)
    config = TrainingConfig(steps=3, batch=2, lr=1e-2, warmup_steps=0, log_every=1, precision="bf16")
    average = train(objective, Pairs(), config, tmp_path, identity={}, show_progress=False)
    assert isinstance(average, ARDiffusion)
    assert '"velocity_error"' in (tmp_path / "log.jsonl").read_text()
    for name, parameter in teacher.backbone.named_parameters():
        assert torch.equal(parameter, before[name]), name
    moved = dict(objective.model.backbone.named_parameters())
    assert any(not torch.equal(moved[name], before[name]) for name in before)


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
@TEACHERS
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
        if gradient is None:  # the logit head
            assert name.startswith(("backbone.norm.", "backbone.output.", "backbone.head"))
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


class Generator(nn.Module):
    """One step from noise [B,2,C] to two positions: continuous vectors, or codes straight through their argmax.

    It begins with positions that know nothing of each other.
    """

    def __init__(self, codebook_VC: Tensor, *, emits_codes: bool) -> None:
        super().__init__()
        V, C = codebook_VC.shape
        self.codebook_VC, self.emits_codes = codebook_VC, emits_codes
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(2 * C, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
            nn.Linear(64, 2 * (V if emits_codes else C)), nn.Unflatten(1, (2, -1)),
        )  # fmt: skip

    def forward(self, noise_BLC: Tensor) -> Tensor:
        if not self.emits_codes:
            return noise_BLC + self.network(noise_BLC)
        logits_BLV = 2 * noise_BLC @ self.codebook_VC.T + self.network(noise_BLC)
        expected = logits_BLV.softmax(-1) @ self.codebook_VC
        return expected + (self.codebook_VC[logits_BLV.argmax(-1)] - expected).detach()

    @torch.no_grad()
    def ids(self, count: int) -> Tensor:
        noise = torch.randn(count, 2, self.codebook_VC.shape[1], generator=seeded(9))
        return nearest_code(self(noise), self.codebook_VC)


def distilled(joint_VV: Tensor, codebook_VC: Tensor, *, emits_codes: bool, steps: int, **options: Any) -> Generator:
    """The second stage from fresh networks, both losses in one backward pass."""
    teacher, noise = table_teacher(joint_VV, codebook_VC), seeded(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Generator(codebook_VC, emits_codes=emits_codes)
        term = ScoreTerm(teacher, ARDiffusion.from_teacher(teacher, width=32, depth=2), guidance_draws=2, **options)
    before = total_variation(student.ids(20_000), joint_VV)
    assert before > 0.35
    rates = {2e-3: student.parameters(), 5e-3: term.guidance.parameters()}
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


def test_a_joint_distribution_in_one_step() -> None:
    student = distilled(JOINT, CODES, emits_codes=True, steps=300, draws=2)
    assert total_variation(student.ids(20_000), JOINT) < 0.06
