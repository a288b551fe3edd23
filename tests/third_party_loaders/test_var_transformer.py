"""VAR's transformer and its students: the block, the masks, the cache, the guidance, the indicator.

B batch, L token positions, N positions of one call, V codes, C code width, D model width, H heads.
"""

from typing import Any

import pytest
import torch
from tiny import VAR_SCALES, make_var_student, make_var_teacher, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.randomness import draw_noise
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher, inverse_cdf

L, C, V, D = 14, 8, 32, 16
SCALE = torch.tensor([k for k, side in enumerate(VAR_SCALES) for _ in range(side * side)])
VARIANTS = ({}, {"shared_modulation": True}, {"unit_attention": False, "width": 128})
IDS = torch.randint(V, (2, L), generator=seeded(0))
NOISE = draw_noise(seeded(1), 2, (L, C))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_var_teacher()


@pytest.fixture(scope="module")
def student(teacher: Teacher) -> Student:
    return make_var_student(teacher)


# --- the parts ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("unit", [True, False])
def test_attention_is_scaled_as_upstream_scales_it(unit: bool) -> None:
    attention = make_var_teacher(unit_attention=unit).backbone.blocks[0].attn
    x_BND = torch.randn(2, 5, D, generator=seeded(0))
    if unit:
        attention.scale_mul_1H11.data = torch.tensor([1.0, 9.0]).view(1, 2, 1, 1)
    q, k, v = (x_BND @ attention.mat_qkv.weight.T).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    q, v = (part + bias.view(2, 1, 8) for part, bias in ((q, attention.q_bias), (v, attention.v_bias)))
    if unit:  # the second head's scale, e^9, is capped at 100
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = cosines * torch.tensor([2.71828183, 100.0]).view(2, 1, 1)
    else:
        scores = q @ k.mT / (4 * 8**0.5)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x_BND, None, 0, None), attention.proj(mixed))


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_a_class_gates_scales_and_shifts_in_upstreams_order(shared: bool) -> None:
    backbone = make_var_teacher(depth=1, shared_modulation=shared).backbone
    block, class_BD = backbone.blocks[0], backbone.class_emb(torch.tensor([0, 3]))
    condition = backbone.condition(torch.tensor([0, 3]))
    linear = (backbone.shared_ada_lin if shared else block.ada_lin)[1]
    six_B6D = linear(F.silu(class_BD)).unflatten(-1, (6, D)) + (block.ada_gss[0] if shared else 0)
    gate1, gate2, scale1, scale2, shift1, shift2 = (part[:, None] for part in six_B6D.unbind(1))

    def norm(x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
        return F.layer_norm(x_BND, (D,), eps=1e-6) * (1 + scale_B1D) + shift_B1D

    x_BND = torch.randn(2, 4, D, generator=seeded(0))
    after_BND = x_BND + gate1 * block.attn(norm(x_BND, scale1, shift1), None, 0, None)
    after_BND = after_BND + gate2 * block.ffn(norm(after_BND, scale2, shift2))
    torch.testing.assert_close(block(x_BND, condition.modulation[0], None, 0, None, None), after_BND)
    scale, shift = backbone.head_nm.ada_lin[1](F.silu(class_BD)).unflatten(-1, (2, D))[:, :, None].unbind(1)
    torch.testing.assert_close(backbone.logits(x_BND, condition), backbone.head(norm(x_BND, scale, shift)))


def test_a_teacher_sees_whole_scales_and_a_student_earlier_ones_and_itself(teacher: Teacher, student: Student) -> None:
    assert torch.equal(teacher.backbone.attention_mask(0, L), SCALE[:, None] >= SCALE)
    assert torch.equal(teacher.backbone.attention_mask(1, L), (SCALE[:, None] >= SCALE)[1:])
    assert teacher.backbone.attention_mask(5, L) is None, "the last scale alone sees everything"
    level = torch.cat([torch.zeros(1), 1 + SCALE])
    visible = (level[:, None] > level) | torch.eye(1 + L, dtype=torch.bool)
    assert torch.equal(student.backbone.attention_mask(0, 1 + L), visible)


# --- the teacher ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [*VARIANTS, {"patch_nums": (2, 4)}, {"patch_nums": (1, 2, 3, 4, 6)}], ids=str)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_generation_with_a_cache_equals_teacher_forcing(guidance: float, sizes: dict[str, Any]) -> None:
    teacher, labels = make_var_teacher(**sizes), torch.tensor([0, 3])
    emitted: list[Tensor] = []

    def pick(log_probs_BNV: Tensor, start: int) -> Tensor:
        emitted.append(log_probs_BNV)
        return log_probs_BNV.argmax(-1)

    ids = teacher.walk(labels, pick, Recipe(guidance_scale=guidance))
    cond, uncond = teacher.logits(ids, labels), teacher.logits(ids, teacher.num_classes)
    scale_L = torch.repeat_interleave(torch.arange(len(teacher.steps)), torch.tensor(teacher.steps))
    weight_L1 = guidance * scale_L[:, None] / (len(teacher.steps) - 1)
    expected = (1 + weight_L1) * cond - weight_L1 * uncond
    torch.testing.assert_close(torch.cat(emitted, 1), expected.log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(teacher.generate([0, 3], guidance_scale=guidance, top_k=1), ids)
    assert not torch.allclose(cond, uncond, atol=0.1), "the class matters"


def test_guidance_grows_linearly_with_the_scale_and_0_is_off() -> None:
    backbone = make_var_teacher(patch_nums=(1, 2, 3, 4)).backbone
    assert [backbone.guidance_weight(1.5, k) for k in range(4)] == [0.0, 0.5, 1.0, 1.5]
    assert [backbone.guidance_weight(0.0, k) for k in range(4)] == [0.0] * 4


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_a_token_is_seen_by_all_later_scales_and_by_no_other(sizes: dict[str, Any]) -> None:
    teacher = make_var_teacher(**sizes)
    ids_BL = torch.randint(V, (1, L), generator=seeded(0)).repeat(1 + L, 1)
    ids_BL[1:] = (ids_BL[1:] + 7 * torch.eye(L, dtype=torch.int64)) % V  # row 1 + i changes token i
    logits_BLV = teacher.logits(ids_BL, [2] * (1 + L))
    change_LL = (logits_BLV[1:] - logits_BLV[0]).abs().amax(-1)
    later_LL = SCALE[:, None] < SCALE
    assert change_LL[~later_LL].max() < 1e-4
    assert change_LL[later_LL].min() > 2e-3


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
@pytest.mark.parametrize("begin", [1, 5, 14])
def test_a_walk_resumed_at_a_scale_equals_the_walk_from_the_start(begin: int, sizes: dict[str, Any]) -> None:
    teacher, labels = make_var_teacher(patch_nums=(1, 2, 3, 4), **sizes), torch.tensor([1, 3])
    emitted: list[Tensor] = []
    draw = inverse_cdf(torch.rand(2, teacher.length, generator=seeded(3)))

    def pick(log_probs_BNV: Tensor, start: int) -> Tensor:
        emitted.append(log_probs_BNV)
        return draw(log_probs_BNV, start)

    recipe = Recipe(guidance_scale=2.0)
    whole = teacher.walk(labels, pick, recipe)
    expected = torch.cat(emitted, 1)[:, begin:]
    emitted.clear()
    assert torch.equal(teacher.walk(labels, pick, recipe, resolved_BN=whole[:, :begin]), whole)
    torch.testing.assert_close(torch.cat(emitted, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [(1, 4, 9), (1, 13), (5, 9), (14,)], ids=str)
def test_scales_may_pass_together_or_one_by_one(counts: tuple[int, ...], teacher: Teacher) -> None:
    backbone = teacher.backbone
    with torch.no_grad():
        condition = backbone.condition(torch.tensor([0, 1]))
        inputs_BND = torch.cat([condition.prefix_BPD, backbone.token_inputs(IDS[:, :5])], 1)
        cache = backbone.new_cache(2)
        parts = [backbone.hidden(part, condition, cache=cache) for part in inputs_BND.split(counts, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), backbone.hidden(inputs_BND, condition))


def test_known_inputs_are_those_of_all_scales_less_the_ones_seen(teacher: Teacher) -> None:
    whole = teacher.backbone.token_inputs(IDS[:, :5])
    assert whole.shape == (2, 4 + 9, 16)
    torch.testing.assert_close(teacher.backbone.token_inputs(IDS[:, :1]), whole[:, :4])
    torch.testing.assert_close(teacher.backbone.token_inputs(IDS[:, :5], seen=4), whole[:, 4:])


def test_no_label_is_the_label_after_the_last_class(teacher: Teacher) -> None:
    torch.testing.assert_close(teacher.logits(IDS, None), teacher.logits(IDS, [4, 4]))


# --- the student ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_a_position_sees_earlier_scales_and_its_own_noise_only(sizes: dict[str, Any]) -> None:
    student = make_var_student(make_var_teacher(**sizes))
    sequence_BLC = NOISE[:1].repeat(1 + L, 1, 1)
    sequence_BLC[1:] += 3 * torch.eye(L)[..., None]  # row 1 + i changes position i
    prediction = student.predict(sequence_BLC, [2] * (1 + L))
    seen_LL = (SCALE[:, None] < SCALE) | torch.eye(L, dtype=torch.bool)
    for head_BLX in (prediction.logits_BLV, prediction.embeddings_BLC):
        change_LL = (head_BLX[1:] - head_BLX[0]).abs().amax(-1)
        assert change_LL[~seen_LL].max() < 1e-4
        assert change_LL[seen_LL].min() > 2e-3


def test_each_row_of_the_indicator_reaches_its_positions(teacher: Teacher) -> None:
    student = make_var_student(teacher)
    before = student.predict(NOISE, [0, 1], start=5)
    with torch.no_grad():
        student.indicator.weight[0] += 1
    after = student.predict(NOISE, [0, 1], start=5)
    torch.testing.assert_close(after.logits_BLV[:, :5], before.logits_BLV[:, :5])
    assert (after.logits_BLV - before.logits_BLV)[:, 5:].abs().amax(-1).min() > 1e-2
    assert (after.embeddings_BLC - before.embeddings_BLC)[:, 5:].abs().amax(-1).min() > 1e-2
    resolved = student.predict(NOISE, [0, 1], start=L - 1).logits_BLV
    with torch.no_grad():
        student.indicator.weight[1] += 1
    change_BL = (student.predict(NOISE, [0, 1], start=L - 1).logits_BLV - resolved).abs().amax(-1)
    assert change_BL.min() > 1e-2, "and the class position counts as resolved, so the last one hears of it as well"


def test_the_indicator_of_each_sample_follows_its_own_start(student: Student) -> None:
    both = student.predict(NOISE, [0, 1], start=torch.tensor([5, 0]))
    for row, start in enumerate((5, 0)):
        alone = student.predict(NOISE[row : row + 1], [row], start=start)
        torch.testing.assert_close(both.logits_BLV[row], alone.logits_BLV[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_indicator_map_reaches_both_heads(layer: int, teacher: Teacher) -> None:
    student = make_var_student(teacher)
    assert len(student.indicator_maps) == student.backbone.depth + 1 == 3
    before = student.predict(NOISE, [0, 1])
    with torch.no_grad():
        student.indicator_maps[layer].weight += torch.randn(16, 16, generator=seeded(5))
    after = student.predict(NOISE, [0, 1])
    assert (after.logits_BLV - before.logits_BLV).abs().amax(-1).min() > 1e-2
    assert (after.embeddings_BLC - before.embeddings_BLC).abs().amax(-1).min() > 1e-2


@torch.no_grad()
def test_a_residual_enters_a_block_between_attention_and_feed_forward() -> None:
    backbone = make_var_teacher(depth=1).backbone
    condition = backbone.condition(torch.tensor([0, 1]))
    inputs, residual = torch.randn(2, 2, L, 16, generator=seeded(6))
    inside = backbone.hidden(inputs, condition, residuals=[residual])
    assert not torch.allclose(inside, backbone.hidden(inputs + residual, condition), atol=1e-2), "not before attention"
    nn.init.zeros_(backbone.blocks[0].attn.proj.weight)
    nn.init.zeros_(backbone.blocks[0].attn.proj.bias)
    inside = backbone.hidden(inputs, condition, residuals=[residual])
    torch.testing.assert_close(inside, backbone.hidden(inputs + residual, condition))
    assert not torch.allclose(inside, backbone.hidden(inputs, condition) + residual, atol=1e-2), "not after the block"


@pytest.mark.parametrize(("depth", "kept"), [(None, (0, 1, 2, 3)), (2, (0, 3)), (3, (0, 2, 3))])
@pytest.mark.parametrize("shared", [False, True])
def test_a_student_begins_as_its_teacher(depth: int | None, kept: tuple[int, ...], shared: bool) -> None:
    teacher = make_var_teacher(depth=4, shared_modulation=shared)
    student = make_var_student(teacher, depth=depth)
    theirs, before = teacher.backbone.state_dict(), {n: t.clone() for n, t in student.backbone.state_dict().items()}
    student.initialize_from(teacher)
    ours = student.backbone.state_dict()
    expected = {name: tensor for name, tensor in theirs.items() if not name.startswith("blocks.")}
    for new, old in enumerate(kept):
        prefix = f"blocks.{old}."
        block = {n.removeprefix(prefix): tensor for n, tensor in theirs.items() if n.startswith(prefix)}
        expected |= {f"blocks.{new}.{name}": tensor for name, tensor in block.items()}
    for name, rows in (("lvl_embed.weight", 0), ("pos_1LC", 1)):
        teacher_rows, own_rows = theirs[name].unbind(rows), before[name].unbind(rows)
        expected[name] = torch.stack([teacher_rows[0], own_rows[1], *teacher_rows[1:]], rows)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert not student.indicator.weight.any()


def test_a_first_scale_of_several_tokens_is_refused_to_a_new_student() -> None:
    teacher = make_var_teacher(patch_nums=(2, 3))
    with pytest.raises(ValueError, match="first scale of one token, this teacher's has 4"):
        make_var_student(teacher).initialize_from(teacher)
