"""The autoregressive loop against one full pass for every step, filtering and drawing against their definitions."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import L, make_scale_teacher, make_teacher, make_var_teacher, seeded
from torch import Tensor

from ddecode.randomness import draw_noise, per_sample_generators
from ddecode.teacher import (
    Pick,
    Recipe,
    Teacher,
    argmax,
    filter_log_probs,
    inverse_cdf,
    largest,
)

KINDS = pytest.mark.parametrize("kind", ["teacher", "scale_teacher"])
RECIPES = pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(guidance_scale=2.5), Recipe(guidance_scale=1.7, top_k=6, top_p=0.8)], ids=str
)


def slow_walk(teacher: Teacher, labels: Tensor, pick: Pick, recipe: Recipe) -> Tensor:
    """No cache, no batched guidance: teacher forcing over the whole sequence for every step."""
    ids_BL = torch.zeros(len(labels), teacher.length, dtype=torch.int64)
    begin = 0
    for step, count in enumerate(teacher.steps):
        here = slice(begin, begin + count)
        logits = teacher.logits(ids_BL, labels)[:, here]
        if (w := teacher.backbone.guidance_weight(recipe.guidance_scale, step)) > 0:
            uncond = teacher.logits(ids_BL, torch.full_like(labels, teacher.num_classes))[:, here]
            logits = (1 + w) * logits - w * uncond
        ids_BL[:, here] = pick(filter_log_probs(logits, top_k=recipe.top_k, top_p=recipe.top_p), begin)
        begin += count
    return ids_BL


@KINDS
@RECIPES
def test_cached_generation_equals_uncached(kind: str, recipe: Recipe, request: pytest.FixtureRequest) -> None:
    teacher: Teacher = request.getfixturevalue(kind)
    labels = torch.tensor([0, 1, 2, 1, 0])
    uniforms = torch.rand(5, teacher.length, generator=seeded(0))
    seen: dict[str, list[Tensor]] = {"fast": [], "slow": []}

    def recorded(name: str) -> Pick:
        def pick(log_probs: Tensor, start: int) -> Tensor:
            seen[name].append(log_probs)
            return inverse_cdf(uniforms)(log_probs, start)

        return pick

    fast = teacher.walk(labels, recorded("fast"), recipe)
    slow = slow_walk(teacher, labels, recorded("slow"), recipe)
    assert fast.dtype == torch.int64 and torch.equal(fast, slow)
    assert len({tuple(row.tolist()) for row in fast}) == 5
    for a, b in zip(seen["fast"], seen["slow"], strict=True):
        torch.testing.assert_close(a.exp(), b.exp(), atol=1e-5, rtol=1e-4)


def test_logits_do_not_see_their_own_or_later_tokens(teacher: Teacher, scale_teacher: Teacher) -> None:
    for model in (teacher, scale_teacher):
        ids = torch.randint(12, (2, model.length), generator=seeded(1))
        changed = ids.clone()
        changed[:, 5:] = (changed[:, 5:] + 1) % 12
        difference = (model.logits(ids, [0, 1]) - model.logits(changed, [0, 1])).abs().amax((0, 2))
        first = next(sum(model.steps[: k + 1]) for k in range(len(model.steps)) if sum(model.steps[: k + 1]) > 5)
        assert not difference[:first].any()
        assert first == model.length or difference[first:].min() > 1e-4


def test_guidance_is_upstreams_formula(teacher: Teacher) -> None:
    assert [teacher.backbone.guidance_weight(s, 3) for s in (0.0, 1.0, 1.5, 4.0)] == [0.0, 0.0, 0.5, 3.0]
    labels, seen = torch.tensor([1, 2]), []

    def pick(log_probs: Tensor, start: int) -> Tensor:
        seen.append(log_probs[:, 0])
        return argmax(log_probs, start)

    teacher.walk(labels, pick, Recipe(guidance_scale=3.0), stop=1)
    empty = torch.zeros(2, L, dtype=torch.int64)
    cond, uncond = teacher.logits(empty, labels)[:, 0], teacher.logits(empty, 4)[:, 0]
    torch.testing.assert_close(seen[0], (uncond + 3.0 * (cond - uncond)).log_softmax(-1))
    assert torch.equal(
        teacher.generate(labels, guidance_scale=1.0, generator=seeded(0)),
        teacher.generate(labels, generator=seeded(0)),
    )


def slow_filter(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One row, code by code."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept = order[:top_k] if top_k else order
    mass, before, chosen = sum(float(p[j]) for j in kept), 0.0, []
    for j in kept:
        if before <= top_p or top_p == 1.0:
            chosen.append(j)
        before += float(p[j]) / mass
    result = torch.full_like(p, -math.inf)
    result[chosen] = (p[chosen] / p[chosen].sum()).log()
    return result.float()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_filter_equals_its_definition(temperature: float, top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(3, 2, 40, generator=seeded(2))
    filtered = filter_log_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    slow = torch.stack([slow_filter(row, temperature, top_k, top_p) for row in logits.flatten(0, 1)])
    torch.testing.assert_close(filtered.flatten(0, 1), slow, atol=1e-5, rtol=1e-4)


def filtered_in_turn(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k, then a sort of all codes for top-p, each normalised anew."""
    log_probs = logits.log_softmax(-1)
    if 0 < top_k < logits.shape[-1]:
        kth = log_probs.topk(top_k, -1).values[..., -1:]
        log_probs = log_probs.masked_fill(log_probs < kth, -math.inf).log_softmax(-1)
    if top_p < 1.0:
        ordered, order = log_probs.sort(-1, descending=True)
        excluded = torch.zeros_like(log_probs, dtype=torch.bool)
        excluded.scatter_(-1, order, ordered.exp().cumsum(-1) - ordered.exp() > top_p)
        log_probs = log_probs.masked_fill(excluded, -math.inf).log_softmax(-1)
    return log_probs


@given(
    V=st.integers(1, 300),
    top_k=st.integers(0, 320),
    top_p=st.floats(1e-3, 0.99) | st.just(1.0),
    spread=st.floats(0.1, 8.0),
    seed=st.integers(0, 2**30),
)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_filter_equals_one_filter_after_the_other(V: int, top_k: int, top_p: float, spread: float, seed: int) -> None:
    logits = spread * torch.randn(3, 2, V, generator=seeded(seed))
    given_logits = logits.clone()
    fused, in_turn = filter_log_probs(logits, top_k=top_k, top_p=top_p), filtered_in_turn(logits, top_k, top_p)
    assert torch.equal(logits, given_logits), "the caller's tensor is left alone"
    # by rounding, a sum may fall on the other side of top_p, or a code tie with the k-th
    differ = fused.isinf() != in_turn.isinf()
    assert differ.sum(-1).max() <= 1
    same = ~differ.any(-1)
    torch.testing.assert_close(fused[same], in_turn[same], atol=1e-5, rtol=1e-4)


def test_ties_stay() -> None:
    logits = torch.tensor([[[1.0, 0.0, 1.0, 0.0, -1.0, 1.0]]])
    assert filter_log_probs(logits, top_k=2).isfinite().flatten().tolist() == [True, False, True, False, False, True]
    assert filter_log_probs(logits, top_p=0.1).isfinite().flatten().tolist() == [True, False, True, False, False, True]


def test_codes_that_the_model_itself_excludes_stay_excluded() -> None:
    logits = torch.tensor([[[0.5, -math.inf, 0.0, -math.inf]]])
    for options in ({}, {"top_k": 3}, {"top_p": 0.99}, {"top_k": 3, "top_p": 0.99}):
        filtered = filter_log_probs(logits, **options)
        torch.testing.assert_close(filtered, logits.log_softmax(-1))


def test_largest_of_each_row() -> None:
    values = torch.randn(4, 3, 50, generator=seeded(0))
    for k in (1, 7, 50):
        expected = values.sort(-1, descending=True).values[..., :k]
        assert torch.equal(largest(values, k, ordered=True), expected)
        assert torch.equal(largest(values, k, ordered=False).sort(-1, descending=True).values, expected)


def test_top_k_1_is_greedy(teacher: Teacher) -> None:
    labels = torch.tensor([0, 3])
    greedy = teacher.generate(labels, guidance_scale=2.0, top_k=1, generator=seeded(0))
    assert torch.equal(greedy, slow_walk(teacher, labels, argmax, Recipe(guidance_scale=2.0)))
    assert torch.equal(greedy, teacher.generate(labels, guidance_scale=2.0, top_k=1, generator=seeded(1)))


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.15, 0.0, 0.25, 0.01, 0.24, 0.0])
    uniforms = torch.rand(20000, 1, generator=seeded(3))
    drawn = inverse_cdf(uniforms)(p.log().expand(20000, 1, -1), 0)
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert not counts[p == 0].any()
    expected = 20000 * p[p > 0].double()
    assert chisquare(counts[p > 0].numpy(), (expected * 20000 / expected.sum()).numpy()).pvalue > 1e-4


def test_extreme_draws_never_fall_on_an_excluded_code() -> None:
    log_p = torch.full((2, 1, 50), -math.inf)
    log_p[:, 0, 10:40] = -math.log(30)
    ends = torch.tensor([[0.0], [1 - 2**-24]])
    assert inverse_cdf(ends)(log_p, 0).flatten().tolist() == [10, 39]


def test_every_position_is_drawn_with_its_own_number() -> None:
    uniforms = torch.tensor([[0.05, 0.15, 0.35, 0.95], [0.65, 0.55, 0.45, 0.25]])
    tenths = torch.full((2, 2, 10), 0.1).log()
    assert inverse_cdf(uniforms)(tenths, 0).tolist() == [[0, 1], [6, 5]]
    assert inverse_cdf(uniforms)(tenths, 2).tolist() == [[3, 9], [4, 2]]


@KINDS
def test_a_sample_does_not_depend_on_its_batch(kind: str, request: pytest.FixtureRequest) -> None:
    teacher: Teacher = request.getfixturevalue(kind)
    labels = [2, 0, 1, 2]
    options = {"guidance_scale": 2.0, "top_k": 8}
    together = teacher.generate(labels, generator=[seeded(i) for i in range(4)], **options)
    apart = [teacher.generate([labels[i]], generator=seeded(i), **options) for i in range(4)]
    assert torch.equal(together, torch.cat(apart))


def test_without_generator_torchs_own_serves(teacher: Teacher) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        ids = teacher.generate([0, 1])
    assert torch.equal(ids, teacher.generate([0, 1], generator=seeded(7)))
    assert not torch.equal(ids, teacher.generate([0, 1], generator=seeded(8)))


def test_noise_is_drawn_sample_by_sample() -> None:
    noise = draw_noise(seeded(0), 3, (5, 2))
    g = seeded(0)
    assert torch.equal(noise, torch.stack([torch.randn(5, 2, generator=g) for _ in range(3)]))
    assert torch.equal(draw_noise([seeded(4), seeded(0)], 2, (5, 2))[1], noise[0])
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        per_sample_generators([seeded(0), seeded(1)], 3)


def test_labels_in_any_form(teacher: Teacher) -> None:
    ids = torch.randint(32, (3, L), generator=seeded(4))
    expected = teacher.logits(ids, torch.tensor([2, 2, 2]))
    for labels in (2, [2, 2, 2], (2, 2, 2), torch.tensor(2), torch.tensor([2, 2, 2], dtype=torch.int32)):
        assert torch.equal(teacher.logits(ids, labels), expected)
    assert teacher.generate(1).shape == (1, L)
    assert expected.shape == (3, L, 32) and expected.dtype == torch.float32


def test_label_num_classes_is_the_unconditional_one() -> None:
    teacher = make_teacher(seed=5)
    table = teacher.backbone.cls_embedding.embedding_table.weight
    assert len(table) == teacher.num_classes + 1
    ids = torch.randint(32, (2, L), generator=seeded(4))
    expected = teacher.logits(ids, teacher.num_classes)
    assert not torch.allclose(teacher.logits(ids, 1), expected)
    table.data[1] = table.data[-1]
    torch.testing.assert_close(teacher.logits(ids, 1), expected)


@pytest.mark.parametrize(
    "labels", [5, -1, [0, 5], [], torch.tensor([0.0]), torch.tensor([[0]]), [True, False], [1.5], torch.tensor([9])]
)
def test_wrong_labels_are_refused(teacher: Teacher, labels: object) -> None:
    with pytest.raises(ValueError, match="class"):
        teacher.generate(labels)


def test_labels_of_another_batch_are_refused(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="2 class labels for a batch of 3"):
        teacher.logits(torch.zeros(3, L, dtype=torch.int64), [0, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": -1.0}, {"guidance_scale": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
        {"temperature": 0.0}, {"temperature": -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(teacher: Teacher, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        teacher.generate([0], **options)


def test_low_temperature_is_nearly_greedy(teacher: Teacher) -> None:
    cold = teacher.generate([0, 1, 2], temperature=1e-4, generator=seeded(0))
    assert torch.equal(cold, teacher.generate([0, 1, 2], top_k=1))


@KINDS
def test_a_resolved_prefix_is_continued_as_in_the_full_walk(kind: str, request: pytest.FixtureRequest) -> None:
    teacher: Teacher = request.getfixturevalue(kind)
    labels = torch.tensor([1, 2, 0])
    recipe = Recipe(guidance_scale=2.0, top_k=7)
    pick = inverse_cdf(torch.rand(3, teacher.length, generator=seeded(6)))
    full = teacher.walk(labels, pick, recipe)
    for begin, stop in ((1, teacher.length), (4, 8), (4, teacher.length), (0, 4), (4, 4)):
        assert torch.equal(
            teacher.walk(labels, pick, recipe, resolved_BN=full[:, :begin], stop=stop), full[:, :stop]
        ), (begin, stop)


def test_positions_inside_a_step_are_refused(scale_teacher: Teacher) -> None:
    assert [scale_teacher.step_at(p) for p in (0, 1, 4, 8)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no step boundary"):
        scale_teacher.step_at(2)


def test_model_and_tokenizer_must_have_the_same_codes() -> None:
    with pytest.raises(ValueError, match="31 codes, the tokenizer has 32"):
        make_teacher(vocab_size=31)


def test_it_is_in_evaluation_mode() -> None:
    teacher = make_teacher()
    teacher.backbone.train()
    again = Teacher(teacher.backbone, teacher.tokenizer, family="llamagen")
    assert not again.backbone.training and not again.tokenizer.training


@pytest.mark.parametrize("make", [make_teacher, make_var_teacher, make_scale_teacher])
@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(guidance_scale=2.5), Recipe(guidance_scale=1.7, top_k=6, top_p=0.8), Recipe(top_k=3)],
    ids=str,
)
def test_log_probs_are_what_the_walk_hands_to_its_pick(make: Any, recipe: Recipe) -> None:
    teacher: Teacher = make()
    labels, seen = torch.tensor([0, 1, 2, 1]), []
    draw = inverse_cdf(torch.rand(4, teacher.length, generator=seeded(0)))

    def pick(log_probs_BNV: Tensor, start: int) -> Tensor:
        seen.append(log_probs_BNV)
        return draw(log_probs_BNV, start)

    ids = teacher.walk(labels, pick, recipe)
    ours, walked = teacher.log_probs(ids, labels, recipe), torch.cat(seen, 1)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    assert torch.equal(ours.isinf(), walked.isinf())
    torch.testing.assert_close(ours, walked, atol=1e-4, rtol=1e-4)
