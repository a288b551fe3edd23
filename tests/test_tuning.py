"""DD2's first stage: the guidance network, what it sees, learns and samples, on toys whose distribution is known.

R noise draws, B batch, L positions, V codes, C code width.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from table_teacher import CODES, JOINT, AnalyticGuidance, draw_ids, labels_of, table_teacher, total_variation
from tiny import make_scale_teacher, make_teacher, make_var_teacher, scramble, seeded
from torch import Tensor, nn

from ddecode.codebook import nearest_code
from ddecode.objectives.guidance import ARDiffusion
from ddecode.objectives.posterior import noisy_codes, posterior_mean, velocity
from ddecode.objectives.tuning import TuningObjective
from ddecode.teacher import Recipe, Teacher
from ddecode.training import train
from ddecode.training_config import TrainingConfig
from ddecode.trajectory import resolve

TEACHERS = pytest.mark.parametrize("make", [make_teacher, make_var_teacher, make_scale_teacher])


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
