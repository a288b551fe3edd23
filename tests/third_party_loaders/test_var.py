"""VAR's checkpoints and plans: equal to upstream where its tensors are at hand; its names, its strictness, its spans.

B batch, L token positions, V codes, C code width.
"""

import math
from typing import Any

import pytest
import torch
from parity import close, fixture, needs_parity
from tiny import VAR_SCALES, make_teacher, make_var_student, make_var_teacher, make_var_tokenizer, seeded
from torch import Tensor
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.plan import parse_plan
from ddecode.randomness import draw_noise
from ddecode.sampling import execute
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher, inverse_cdf
from third_party_loaders import load_dd1_student, load_var
from third_party_loaders.adapter import own_student_state, upstream_student_state
from third_party_loaders.state import meta_module
from third_party_loaders.var import (
    PUBLISHED_PATCH_NUMS,
    build_backbone,
    build_tokenizer,
    load_tokenizer,
    own_tokenizer_state,
    upstream_tokenizer_state,
)
from third_party_loaders.var_tokenizer import MultiScaleVQ, MultiScaleVQConfig
from third_party_loaders.var_transformer import VARConfig, VARTransformer

L, C, V = 14, 8, 32
IDS = torch.randint(V, (2, L), generator=seeded(0))
NOISE = draw_noise(seeded(1), 2, (L, C))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_var_teacher()


@pytest.fixture(scope="module")
def student(teacher: Teacher) -> Student:
    """Starts 0 and 5, tokens before position 5 and continuous vectors after it."""
    return make_var_student(teacher)


# --- upstream's own figures -----------------------------------------------------------------------------------


@needs_parity
@pytest.mark.parametrize("fewest_products", [0, 2**62], ids=["onednn", "torch"])
def test_teacher_equals_upstream(fewest_products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddecode.linear.FEWEST_PRODUCTS", fewest_products)
    config, parts = fixture("var")
    given, expected = parts["in"], parts["out"]
    teacher = load_var(parts["model"], parts["tokenizer"], patch_nums=tuple(config["patch_nums"]))
    tokens = given["tokens"]
    codes = F.embedding(tokens, teacher.codebook_VC)
    close(teacher.tokenizer.next_inputs(codes[:, : -teacher.steps[-1]]), expected["next_scale_inputs"])
    close(teacher.logits(tokens, given["labels"]), expected["logits_cond"])
    close(teacher.logits(tokens, config["num_classes"]), expected["logits_uncond"])
    close(teacher.tokenizer.decode(tokens), expected["image"])
    encoded = teacher.tokenizer.encode(given["image"].float())
    assert (encoded == expected["encoded_tokens"]).float().mean() > 0.995
    greedy = teacher.generate(given["labels"], guidance_scale=1.5, top_k=1)
    assert torch.equal(greedy, expected["greedy_tokens_cfg1.5"].long())
    close(teacher.tokenizer.decode(greedy) / 2 + 0.5, expected["greedy_image_cfg1.5"])


@needs_parity
def test_student_equals_upstream() -> None:
    config, parts = fixture("dd_var")
    given, expected = parts["in"], parts["out"]
    patch_nums = tuple(config["patch_nums"])
    split, k = (sum(side * side for side in patch_nums[: config[name]]) for name in ("split", "t2"))
    tokenizer = load_tokenizer(parts["tokenizer"] or fixture("var")[1]["tokenizer"], patch_nums)
    student = load_dd1_student(parts["model"], tokenizer, family="var", patch_nums=patch_nums, split=split)
    noise, labels = given["noise"].float(), given["labels"].long()
    first = student.predict(noise, labels)
    close(first.logits_BLV, expected["logits_t0"], 3e-4)
    close(first.embeddings_BLC, expected["embeddings_t0"], 3e-4)
    one = student.emit(noise, labels, 0, student.length)
    close(one, expected["sequence_1step"], 3e-4)
    close(tokenizer.decode(one), expected["image_1step"], 3e-4)
    two = torch.cat([one[:, :k], student.emit(torch.cat([one[:, :k], noise[:, k:]], 1), labels, k, student.length)], 1)
    close(two[:, k:], expected["sequence_2step"][:, k:], 3e-4)
    close(tokenizer.decode(two), expected["image_2step"], 3e-4)


# --- names and shapes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(teacher: Teacher, student: Student) -> dict[str, dict[str, Tensor]]:
    """Upstream-named states."""
    return {
        "model": teacher.backbone.state_dict(),
        "tokenizer": upstream_tokenizer_state(teacher.tokenizer.state_dict()),
        "student": upstream_student_state(student.state_dict()),
    }


@pytest.mark.parametrize("shared", [False, True])
def test_states_have_upstreams_names(shared: bool) -> None:
    sizes = {"vocab_size": 4096, "code_width": 32, "width": 1024, "depth": 16, "heads": 16}
    config = VARConfig(**sizes, patch_nums=PUBLISHED_PATCH_NUMS[0], shared_modulation=shared)
    with torch.device("meta"):
        state = VARTransformer(config, MultiScaleVQ(MultiScaleVQConfig())).state_dict()
    block = {
        "attn.mat_qkv.weight": (3072, 1024), "attn.q_bias": (1024,), "attn.v_bias": (1024,),
        "attn.zero_k_bias": (1024,), "attn.scale_mul_1H11": (1, 16, 1, 1),
        "attn.proj.weight": (1024, 1024), "attn.proj.bias": (1024,),
        "ffn.fc1.weight": (4096, 1024), "ffn.fc1.bias": (4096,),
        "ffn.fc2.weight": (1024, 4096), "ffn.fc2.bias": (1024,),
    }  # fmt: skip
    modulation = {"ada_lin.1.weight": (6144, 1024), "ada_lin.1.bias": (6144,)}
    block |= {"ada_gss": (1, 1, 6, 1024)} if shared else modulation
    expected = {
        "word_embed.weight": (1024, 32), "word_embed.bias": (1024,), "class_emb.weight": (1001, 1024),
        "pos_start": (1, 1, 1024), "pos_1LC": (1, 680, 1024), "lvl_embed.weight": (10, 1024),
        "head_nm.ada_lin.1.weight": (2048, 1024), "head_nm.ada_lin.1.bias": (2048,),
        "head.weight": (4096, 1024), "head.bias": (4096,),
        **{f"blocks.{i}.{name}": shape for i in range(16) for name, shape in block.items()},
    }  # fmt: skip
    if shared:
        expected |= {f"shared_{name}": shape for name, shape in modulation.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_a_tokenizers_names_go_to_upstream_and_back() -> None:
    own = make_var_tokenizer(channel_mult=(1, 1, 2)).state_dict()
    theirs = upstream_tokenizer_state(own)
    expected = {
        "encoder.down.0.block.0.conv1.weight": (32, 32, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (64, 32, 1, 1),
        "encoder.down.2.attn.0.qkv.weight": (192, 64, 1, 1),
        "encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
        "encoder.mid.attn_1.proj_out.bias": (64,),
        "decoder.mid.block_2.norm1.weight": (64,),
        "decoder.up.2.attn.1.norm.weight": (64,),
        "decoder.up.2.upsample.conv.weight": (64, 64, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (32, 64, 1, 1),
        "decoder.up.0.block.1.conv2.bias": (32,),
        "quantize.quant_resi.qresi_ls.3.weight": (C, C, 3, 3),
        "quantize.ema_vocab_hit_SV": (3, V),
        "quant_conv.weight": (C, C, 3, 3),
    }
    assert {name: tuple(theirs[name].shape) for name in expected} == expected
    assert not any("conv_blocks" in name or ".q." in name for name in theirs)
    back = own_tokenizer_state(theirs)
    assert set(back) == set(own)
    assert all(torch.equal(back[name], own[name]) for name in own)


def test_a_students_names_go_to_upstream_and_back(student: Student) -> None:
    own = student.state_dict()
    theirs = upstream_student_state(own)
    assert {"n_d_embed.weight", "layerwise_n_d_embed.2.bias", "final_layer_conti.scale_shift_table"} <= set(theirs)
    assert theirs["lvl_embed.weight"].shape == (4, 16) and theirs["pos_1LC"].shape == (1, 1 + L, 16)
    back = own_student_state(theirs)
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


def test_weights_built_on_the_meta_device_leave_nothing_there(teacher: Teacher) -> None:
    config = teacher.backbone.config
    blank = meta_module(lambda: VARTransformer(config, teacher.tokenizer))
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    backbone = build_backbone(config, teacher.tokenizer, teacher.backbone.state_dict())
    tokenizer = build_tokenizer(teacher.tokenizer.config, teacher.tokenizer.state_dict())
    for module in (backbone, tokenizer):
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert backbone.level_N.tolist() == upstream_level(VAR_SCALES)[0].tolist()
    assert make_var_student(teacher).backbone.level_N.tolist() == upstream_level((1, *VAR_SCALES))[0].tolist()


# --- loading --------------------------------------------------------------------------------------------------


def load(states: dict[str, dict[str, Tensor]], **changes: Any) -> Teacher:
    return load_var(**{"model": states["model"], "tokenizer": states["tokenizer"], "patch_nums": VAR_SCALES} | changes)


def upstream_level(scales: tuple[int, ...]) -> Tensor:
    return torch.tensor([[k for k, side in enumerate(scales) for _ in range(side * side)]])


def test_states_load_also_without_upstreams_constant_buffers(
    states: dict[str, dict[str, Tensor]], teacher: Teacher
) -> None:
    codes = F.embedding(IDS, teacher.codebook_VC)
    expected, latents = teacher.logits(IDS, [0, 3]), teacher.tokenizer.next_inputs(codes[:, :5])
    level = upstream_level(VAR_SCALES)
    bias = torch.where(level <= level.T, 0.0, -math.inf)[None, None]
    model = states["model"]
    bare = {name: tensor for name, tensor in model.items() if not name.endswith("zero_k_bias")}
    for state in (model, bare, bare | {"lvl_1L": level, "attn_bias_for_masking": bias}):
        loaded = load(states, model=state)
        assert torch.equal(loaded.logits(IDS, [0, 3]), expected)
        assert torch.equal(loaded.tokenizer.next_inputs(codes[:, :5]), latents)
        assert not loaded.backbone.training and not loaded.tokenizer.training
        assert (loaded.steps, loaded.num_classes) == ((1, 4, 9), 4)
    with pytest.raises(ValueError, match=r"attn_bias_for_masking of this state does not belong to patch_nums"):
        load(states, model=bare | {"attn_bias_for_masking": bias.flip(2)})


def test_half_weights_are_cast_up(states: dict[str, dict[str, Tensor]]) -> None:
    half = {part: {name: tensor.half() for name, tensor in state.items()} for part, state in states.items()}
    rounded = {part: {name: tensor.float() for name, tensor in state.items()} for part, state in half.items()}
    loaded = load(half)
    assert {t.dtype for part in (loaded.backbone, loaded.tokenizer) for t in part.state_dict().values()} == {
        torch.float32
    }
    assert torch.equal(loaded.logits(IDS, 0), load(rounded).logits(IDS, 0))


@pytest.mark.parametrize("scales", PUBLISHED_PATCH_NUMS, ids=str)
def test_published_scales_are_found_by_their_number_and_length(scales: tuple[int, ...]) -> None:
    teacher = make_var_teacher(patch_nums=scales, depth=1)
    tokenizer = upstream_tokenizer_state(teacher.tokenizer.state_dict())
    assert load_var(teacher.backbone.state_dict(), tokenizer).backbone.config.patch_nums == scales


def test_other_scales_are_found_in_a_states_own_buffer(states: dict[str, dict[str, Tensor]]) -> None:
    level = {"lvl_1L": upstream_level(VAR_SCALES)}
    assert load(states, model=states["model"] | level, patch_nums=None).steps == (1, 4, 9)
    with pytest.raises(ValueError, match="no published patch_nums have 3 scales and 14 tokens; give them"):
        load(states, patch_nums=None)


@pytest.mark.parametrize("scales", [(1, 2, 4), (1, 3), (1, 1, 2, 3)], ids=str)
def test_wrong_scales_are_refused(scales: tuple[int, ...], states: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match="the state has 3 scales, 14 tokens"):
        load(states, patch_nums=scales)
    known = {"lvl_1L": upstream_level(VAR_SCALES)}
    with pytest.raises(ValueError, match=r"the state has 3 scales \[1, 2, 3\], 14 tokens"):
        load(states, model=states["model"] | known, patch_nums=scales)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_missing_extra_and_misshapen_keys_are_named(part: str, states: dict[str, dict[str, Tensor]]) -> None:
    name = {"model": "blocks.1.attn.proj.weight", "tokenizer": "post_quant_conv.bias"}[part]
    state = states[part]
    with pytest.raises(ValueError, match=f"missing {name}"):
        load(states, **{part: {n: t for n, t in state.items() if n != name}})
    with pytest.raises(ValueError, match=r"unknown surprise\.weight"):
        load(states, **{part: state | {"surprise.weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match=rf"misshapen {name} is \(3,\), expected"):
        load(states, **{part: state | {name: torch.zeros(3)}})


def test_a_tokenizer_of_another_family_is_refused(states: dict[str, dict[str, Tensor]], teacher: Teacher) -> None:
    other = make_teacher().tokenizer
    with pytest.raises(ValueError, match="no VAR tokenizer"):
        load(states, tokenizer=other.state_dict())
    with pytest.raises(ValueError, match="no VAR transformer"):
        load(states, model=make_teacher().backbone.state_dict())
    with pytest.raises(ValueError, match="needs a VAR tokenizer"):
        build_backbone(teacher.backbone.config, other, None)
    with pytest.raises(ValueError, match="needs a VAR tokenizer"):
        load_dd1_student(states["student"], other, family="var", patch_nums=VAR_SCALES, split=5)
    larger = upstream_tokenizer_state(make_var_tokenizer(vocab_size=40).state_dict())
    with pytest.raises(ValueError, match=r"\(\(1, 2, 3\), 32, 8\), the tokenizer \(\(1, 2, 3\), 40, 8\)"):
        load(states, tokenizer=larger)


def test_a_student_loads_from_its_average(
    states: dict[str, dict[str, Tensor]], student: Student, teacher: Teacher
) -> None:
    theirs, expected = states["student"], student.predict(NOISE, [0, 3])
    other = {name: torch.zeros_like(tensor) for name, tensor in theirs.items()}
    for state in (theirs, {"trainer": {"var_wo_ddp": other, "ema_parameters": theirs}}, {"var_wo_ddp": theirs}):
        loaded = load_dd1_student(state, teacher.tokenizer, family="var", patch_nums=VAR_SCALES, split=5)
        assert not loaded.training and loaded.split == 5
        prediction = loaded.predict(NOISE, [0, 3])
        assert torch.equal(prediction.logits_BLV, expected.logits_BLV)
        assert torch.equal(prediction.embeddings_BLC, expected.embeddings_BLC)
    name = "layerwise_n_d_embed.2.bias"
    with pytest.raises(ValueError, match=rf"missing ({name}|indicator_maps\.2\.bias)"):
        missing = {n: tensor for n, tensor in theirs.items() if n != name}
        load_dd1_student(missing, teacher.tokenizer, family="var", patch_nums=VAR_SCALES, split=5)


# --- plans ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task() -> dict[str, Any]:
    uniforms_BL = torch.rand(2, L, generator=seeded(8))
    recipe = Recipe(guidance_scale=2.0, top_k=20)
    return {"noise_BLC": NOISE, "uniforms_BL": uniforms_BL, "labels": torch.tensor([0, 3]), "recipe": recipe}


def test_spans_of_the_teacher_equal_its_generation(teacher: Teacher, task: dict[str, Any]) -> None:
    whole = teacher.walk(task["labels"], inverse_cdf(task["uniforms_BL"]), task["recipe"])
    for text in ("teacher:0-14", "teacher:0-1,teacher:1-14", "teacher:0-5,teacher:5-14"):
        progress = execute(parse_plan(text, L), {"teacher": teacher}, **task)
        assert torch.equal(progress.embeddings_BLC, F.embedding(whole, teacher.codebook_VC))
        assert progress.network_evaluations == 3


def test_a_student_emits_codes_before_the_split_and_vectors_after_it(
    student: Student, teacher: Teacher, task: dict[str, Any]
) -> None:
    progress = execute(parse_plan("student:0-14", L), {"student": student}, **task)
    prediction = student.predict(task["noise_BLC"], [0, 3])
    codes = F.embedding(prediction.logits_BLV.argmax(-1), teacher.codebook_VC)
    assert progress.network_evaluations == 1
    torch.testing.assert_close(progress.embeddings_BLC[:, :5], codes[:, :5])
    torch.testing.assert_close(progress.embeddings_BLC[:, 5:], prediction.embeddings_BLC[:, 5:])


def test_the_teacher_steps_in_between_two_passes(student: Student, teacher: Teacher, task: dict[str, Any]) -> None:
    plan = parse_plan("student:0-14,teacher:1-5,student:5-14", L)
    progress = execute(plan, {"student": student, "teacher": teacher}, **task)
    assert progress.network_evaluations == 3
    noise, labels = task["noise_BLC"], task["labels"]
    kept = nearest_code(student.emit(noise, labels, 0, 1), teacher.codebook_VC)
    pick = inverse_cdf(task["uniforms_BL"])
    ids = teacher.walk(labels, pick, task["recipe"], resolved_BN=kept, stop=5)
    codes = F.embedding(ids, teacher.codebook_VC)
    last = student.emit(torch.cat([codes, noise[:, 5:]], 1), labels, 5, L)
    torch.testing.assert_close(progress.embeddings_BLC, torch.cat([codes, last], 1))


@pytest.mark.parametrize("text", ["teacher:0-3,teacher:3-14", "student:0-14,teacher:4-14"])
def test_a_teachers_span_off_a_scale_is_refused(
    text: str, student: Student, teacher: Teacher, task: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"no step boundary of this teacher; those are \[0, 1, 5, 14\]"):
        execute(parse_plan(text, L), {"student": student, "teacher": teacher}, **task)
