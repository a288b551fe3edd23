"""Resolving noise sequences: against the loop written out, and the distribution of what comes out."""

import pytest
import torch
from scipy.stats import chisquare
from tiny import C, L, V, seeded

from ddecode.flow import flow_grid, noise_to_tokens
from ddecode.teacher import Recipe, Teacher, filter_log_probs
from ddecode.trajectory import flow_pick, resolve


@pytest.mark.parametrize("kind", ["teacher", "scale_teacher"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "top_k": 6, "top_p": 0.9, "num_steps": 8}], ids=str)
def test_resolve_equals_the_loop_over_steps(kind: str, options: dict, request: pytest.FixtureRequest) -> None:
    teacher: Teacher = request.getfixturevalue(kind)
    codebook = teacher.codebook_VC
    noise = torch.randn(4, teacher.length, codebook.shape[1], generator=seeded(0))
    labels = torch.tensor([0, 2, 1, 1])
    filters = {key: options[key] for key in ("top_k", "top_p") if key in options}
    expected = torch.zeros(4, teacher.length, dtype=torch.int64)
    begin = 0
    for step, count in enumerate(teacher.steps):
        here = slice(begin, begin + count)
        w = teacher.backbone.guidance_weight(options.get("guidance_scale", 0.0), step)
        cond, uncond = (teacher.logits(expected, y)[:, here] for y in (labels, teacher.num_classes))
        log_probs = filter_log_probs(cond + w * (cond - uncond), **filters)
        expected[:, here] = noise_to_tokens(noise[:, here], log_probs, codebook, options.get("num_steps", 16))
        begin += count
    ids = resolve(teacher, noise, labels, **options)
    assert ids.dtype == torch.int64 and torch.equal(ids, expected)
    assert ids.unique().numel() > 4


def test_a_sample_does_not_depend_on_its_batch(teacher: Teacher) -> None:
    noise = torch.randn(4, L, C, generator=seeded(1))
    labels = [3, 1, 0, 1]
    together = resolve(teacher, noise, labels, guidance_scale=2.0)
    apart = [resolve(teacher, noise[i : i + 1], labels[i], guidance_scale=2.0) for i in range(4)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("shape", [(2, L, C + 1), (2, L - 1, C), (L, C), (2, 4, 4, C)])
def test_noise_of_another_shape_is_refused(teacher: Teacher, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"noise must be \[B, 16, 8\]"):
        resolve(teacher, torch.randn(shape), 0)


def test_wrong_options_are_refused(teacher: Teacher) -> None:
    noise = torch.randn(2, L, C)
    for options in ({"num_steps": 0}, {"top_k": -1}, {"top_p": 0.0}, {"guidance_scale": -2.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            resolve(teacher, noise, 0, **options)
    with pytest.raises(ValueError, match="out of range"):
        resolve(teacher, noise, 5)


def test_tokens_follow_the_teachers_probabilities(teacher: Teacher) -> None:
    count = 8000
    recipe = Recipe(guidance_scale=2.0, top_k=20)
    labels = torch.full((count,), 1)
    noise = torch.randn(count, L, C, generator=seeded(2))
    pick = flow_pick(noise, teacher.codebook_VC, flow_grid(teacher.codebook_VC, 64))
    first = teacher.walk(labels, pick, recipe, stop=1)[:, 0]

    empty = torch.zeros(1, L, dtype=torch.int64)
    cond, uncond = (teacher.logits(empty, y)[0, 0] for y in (1, teacher.num_classes))
    p = filter_log_probs(2 * cond - uncond, top_k=20).exp().double()
    observed = torch.bincount(first, minlength=V)
    assert not observed[p == 0].any()
    common = p * count >= 5
    expected = torch.cat([p[common], p[~common].sum()[None]]) * count
    grouped = torch.cat([observed[common], observed[~common].sum()[None]])
    present = expected > 0
    assert present.sum() > 5
    scaled = expected[present] * count / expected[present].sum()
    assert chisquare(grouped[present].numpy(), scaled.numpy()).pvalue > 1e-4


def test_the_map_stays_in_fp32_under_autocast(teacher: Teacher) -> None:
    noise = torch.randn(50, 4, C, generator=seeded(3))
    log_probs = (2 * torch.randn(50, 4, V, generator=seeded(4))).log_softmax(-1)
    pick = flow_pick(noise, teacher.codebook_VC, flow_grid(teacher.codebook_VC, 16))
    plain = pick(log_probs, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pick(log_probs, 0), plain)
