"""LlamaGen's transformer: rotary positions, the cache in half precision, captions.

B batch, L token positions, P condition positions, N positions of one call, V codes, C code width.
"""

import pytest
import torch
from tiny import C, L, make_teacher, scramble, seeded
from torch import Tensor

from ddecode.teacher import Recipe, Teacher, argmax
from ddecode.trajectory import resolve
from third_party_loaders.llamagen_transformer import LlamaGenTransformer, TransformerConfig, rotary_factors


def test_rotary_factors_are_zero_at_the_condition_and_turn_by_row_and_column() -> None:
    factors = rotary_factors(4, 16, 3)
    assert factors.shape == (3 + 16, 8, 2)
    assert not factors[:3].any()
    rates = 10000.0 ** (-torch.arange(0, 8, 2)[:4] / 8)
    for row, column in ((0, 0), (2, 3), (3, 1)):
        angles = torch.cat([row * rates, column * rates])
        expected = torch.stack([angles.cos(), angles.sin()], -1)
        torch.testing.assert_close(factors[3 + 4 * row + column], expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_walks_as_it_forces(dtype: torch.dtype, autocast: bool) -> None:
    """Cached steps and one pass differ by rounding alone."""
    teacher = make_teacher(seed=3)
    for parameter in teacher.backbone.parameters():
        parameter.data = parameter.data.to(dtype)
    seen: list[Tensor] = []

    def pick(log_probs_BNV: Tensor, start: int) -> Tensor:
        seen.append(log_probs_BNV)
        return argmax(log_probs_BNV, start)

    labels = torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ids = teacher.walk(labels, pick, Recipe())
        forced = teacher.log_probs(ids, labels, Recipe())
    exact = dtype == torch.float32 and not autocast
    close = {"atol": 1e-4, "rtol": 1e-4} if exact else {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(torch.cat(seen, 1), forced, **close)


@pytest.fixture(scope="module")
def caption_teacher() -> Teacher:
    config = TransformerConfig(
        vocab_size=32, width=32, depth=2, heads=2, tokens=L, num_classes=0, caption_width=12, caption_length=5
    )
    backbone = LlamaGenTransformer(config)
    scramble(backbone, 4)
    return Teacher(backbone, make_teacher().tokenizer, family="llamagen")


def test_padding_of_a_caption_is_not_seen(caption_teacher: Teacher) -> None:
    ids = torch.randint(32, (2, L), generator=seeded(1))
    features = torch.randn(2, 5, 12, generator=seeded(2))
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    logits = caption_teacher.logits(ids, (features, mask))
    assert logits.isfinite().all()
    padding, words = features.clone(), features.clone()
    padding[:, 0] += 1
    words[:, 3] += 1
    torch.testing.assert_close(caption_teacher.logits(ids, (padding, mask)), logits)
    assert not torch.allclose(caption_teacher.logits(ids, (words, mask)), logits, atol=1e-3)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 32
    difference = (caption_teacher.logits(other, (features, mask)) - logits).abs().amax((0, 2))
    assert not difference[0] and difference[1:].min() > 1e-4, "image tokens see those before them"
    ones = torch.ones_like(mask)
    assert not torch.allclose(caption_teacher.logits(ids, (features, ones)), logits, atol=1e-3)


def test_captions_are_cached_and_guided_as_uncached(caption_teacher: Teacher) -> None:
    condition = torch.randn(2, 5, 12, generator=seeded(3)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    null = caption_teacher.backbone.unconditional(condition)
    ids = torch.zeros(2, L, dtype=torch.int64)
    for i in range(L):
        cond, uncond = (caption_teacher.logits(ids, c)[:, i] for c in (condition, null))
        ids[:, i] = (uncond + 3 * (cond - uncond)).argmax(-1)
    assert torch.equal(caption_teacher.generate(condition, guidance_scale=3.0, top_k=1), ids)


def test_a_condition_of_the_wrong_kind_is_refused(caption_teacher: Teacher, teacher: Teacher) -> None:
    features, mask = torch.zeros(2, 5, 12), torch.ones(2, 5)
    with pytest.raises(ValueError, match="takes class labels, not captions"):
        teacher.generate((features, mask))
    for wrong in ([0, 0], (features[:, :4], mask[:, :4]), (features[..., :3], mask), (features, mask[:1])):
        with pytest.raises(ValueError, match="captions"):
            caption_teacher.generate(wrong)


def test_nothing_given_is_one_sample_without_condition(caption_teacher: Teacher, teacher: Teacher) -> None:
    null = caption_teacher.backbone.null_labels(1)
    assert torch.equal(caption_teacher.generate(None, top_k=1), caption_teacher.generate(null, top_k=1))
    assert torch.equal(teacher.generate(None, top_k=1), teacher.generate(teacher.num_classes, top_k=1))
    noise = torch.randn(2, L, C, generator=seeded(0))
    assert torch.equal(resolve(teacher, noise, None), resolve(teacher, noise, teacher.num_classes))


def test_no_caption_is_the_unconditional_embedding(caption_teacher: Teacher) -> None:
    ids = torch.randint(32, (2, L), generator=seeded(1))
    null = caption_teacher.backbone.cls_embedding.uncond_embedding.expand(2, -1, -1)
    expected = caption_teacher.logits(ids, (null, torch.ones(2, 5)))
    torch.testing.assert_close(caption_teacher.logits(ids, None), expected)
