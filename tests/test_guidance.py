"""Guidance networks are shown every kind of pass that a student makes, and learn each for itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import make_student, make_teacher, make_wavefront_student, scramble, seeded
from torch import Tensor

from ddecode.objective_config import ObjectiveConfig, ScoreConfig
from ddecode.objectives.guidance import ARDiffusion, Guidance, TokenGuidance
from ddecode.objectives.posterior import noisy_codes
from ddecode.objectives.score import ScoreTerm
from ddecode.objectives.student import StudentObjective
from ddecode.student import Student


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["dd1", "wavefront"])
def test_the_guidance_networks_turn_shows_it_every_pass(kind: str, share: float) -> None:
    """Behind the pairs' tokens or, by `own_prefix`, behind the student's own; a wavefront has one that ends early."""
    teacher = make_teacher()
    student: Student = make_student(teacher) if kind == "dd1" else make_wavefront_student(teacher)
    seen: dict[str, Tensor] = {}

    class Watched(ScoreTerm):
        def guidance_loss(self, emitted_BLC: Tensor, *arguments: Any, **options: Any) -> Any:
            seen.update(emitted=emitted_BLC, labels=arguments[0], open=arguments[2], passes=options["pass_B"])
            return super().guidance_loss(emitted_BLC, *arguments, **options)

    guidance = ARDiffusion.from_teacher(teacher, passes=len(student.passes), width=8)
    scramble(guidance.head, 2)  # which begins blind
    term = Watched(teacher, guidance)
    config = ObjectiveConfig(score=ScoreConfig(weight=1.0, updates=2), image_batch=12, own_prefix=share)
    ids = teacher.generate(labels := torch.tensor([0, 1] * 8), generator=seeded(1))
    noise = torch.randn(16, teacher.length, teacher.codebook_VC.shape[1], generator=seeded(0))
    loss, _ = StudentObjective(student, config, score=term)(noise, ids, labels, generator=seeded(2), step=0)
    loss.backward()
    assert all(p.grad is None for p in student.parameters())
    gradient = guidance.passes.weight.grad
    assert gradient is not None and gradient[1].any()

    noise, codes, labels = noise[:12], teacher.codebook_VC[ids[:12]], labels[:12]
    assert torch.equal(seen["labels"], labels) and set(seen["passes"].tolist()) == set(range(len(student.passes)))
    for number, (start, stop) in enumerate(student.passes):
        own = student.emit(noise, labels, 0, start) if start and share else codes[:, :start]
        sequence = torch.cat([own, noise[:, start:]], 1)
        emitted = torch.cat([own, student.emit(sequence, labels, start, stop), codes[:, stop:]], 1)
        these = seen["passes"] == number
        torch.testing.assert_close(seen["emitted"][these], emitted[these])
        assert seen["open"][these, start:stop].all()
        assert not seen["open"][these, :start].any() and not seen["open"][these, stop:].any()


@pytest.mark.parametrize("tokens", [False, True])
def test_guidance_networks_learn_each_pass_for_itself(tokens: bool) -> None:
    """A generator emits one code in one pass and another in two: told the pass, the network knows which."""
    teacher, passes = make_teacher(), torch.arange(32) % 2
    ids, labels = (1 + passes)[:, None].expand(-1, teacher.length), torch.zeros(32, dtype=torch.int64)
    emitted, open_BL = teacher.codebook_VC[ids], torch.zeros(32, teacher.length, dtype=torch.bool)
    open_BL[:, 0] = True  # what comes later could be told from what comes before
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guidance: Guidance = ARDiffusion.from_teacher(teacher, passes=2, width=16, depth=1)
    if tokens:
        guidance = TokenGuidance.from_teacher(teacher, passes=2)
    term, optimizer, noise = ScoreTerm(teacher, guidance), torch.optim.Adam(guidance.parameters(), lr=1e-2), seeded(0)
    for _ in range(160):
        optimizer.zero_grad()
        term.guidance_loss(emitted, labels, noise, open_BL, pass_B=passes)[0].backward()
        optimizer.step()
    assert not guidance.passes.weight[0].any() and guidance.passes.weight[1].any()
    blurred = noisy_codes(emitted, 4, seeded(1))
    blurred = replace(blurred, time_RBL=torch.ones_like(blurred.time_RBL), x_RBLC=blurred.noise_RBLC)
    means = guidance.posterior_means(ids, labels, blurred, teacher.codebook_VC, passes)[:, :, 0]
    right, wrong = emitted[:, 0], teacher.codebook_VC[2 - passes]
    assert ((means - right).square().sum(-1) < 0.5 * (means - wrong).square().sum(-1)).all()
