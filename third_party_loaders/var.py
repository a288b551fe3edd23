"""VAR teachers and their DD1 students, assembled from upstream-named states or from our directory format.

B batch, L token positions, V codes, C code width, D model width.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddecode.arguments import shown
from ddecode.student import DD1Student, Student
from ddecode.teacher import Recipe, Teacher
from ddecode.types import Tokenizer
from third_party_loaders.adapter import (
    Adapter,
    count_of,
    encoder_sizes,
    is_student,
    new_student,
    own_student_state,
    shape_of,
    upstream_student_state,
)
from third_party_loaders.state import StateOrPath, built
from third_party_loaders.var_names import own_tokenizer_state, upstream_tokenizer_state
from third_party_loaders.var_tokenizer import MultiScaleVQ, MultiScaleVQConfig
from third_party_loaders.var_transformer import VARConfig, VARTransformer

FAMILY = "var"
PUBLISHED_PATCH_NUMS = (
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # 256 pixels
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),  # 512 pixels
)

# --- our directory format -------------------------------------------------------------------------------------


TokenizerConfig = MultiScaleVQConfig
"""What the `tokenizer` group of a `config.json` holds."""
BackboneConfig = VARConfig
"""What its `backbone` groups hold."""


def build_tokenizer(config: MultiScaleVQConfig, state: Mapping[str, Tensor] | None) -> MultiScaleVQ:
    """Without a state the weights are random."""
    return built(lambda: MultiScaleVQ(config), state, "VAR tokenizer of this config")


def build_backbone(config: VARConfig, tokenizer: Tokenizer, state: Mapping[str, Tensor] | None) -> VARTransformer:
    """Without a state the weights are random."""
    scales = check_tokenizer(config, tokenizer)

    def make() -> VARTransformer:
        backbone = VARTransformer(config, scales)
        if state is None:
            backbone.initialize()
        return backbone

    return built(make, state, "VAR transformer of this config")


def check_tokenizer(config: VARConfig, tokenizer: Tokenizer) -> MultiScaleVQ:
    """The tokenizer as the multi-scale one that a VAR transformer reads.

    Raises:
        ValueError: it is another, or of other scales or codes.
    """
    if not isinstance(tokenizer, MultiScaleVQ):
        raise ValueError(f"a VAR model needs a VAR tokenizer, with residual scales, got {shown(tokenizer)}")
    ours = (config.patch_nums, config.vocab_size, config.code_width)
    theirs = (tokenizer.config.patch_nums, *tokenizer.codebook_VC.shape)
    if ours != theirs:
        raise ValueError(f"the model has scales, codes and code width {ours}, the tokenizer {theirs}")
    return tokenizer


def shared_sizes(tokenizer: MultiScaleVQConfig, side: int) -> dict[str, Any]:
    """What a teacher's sizes have to be for this tokenizer and images of `side` pixels.

    Raises:
        ValueError: such images do not end on its last scale.
    """
    whole = tokenizer.patch_nums[-1] * 2 ** (len(tokenizer.channel_mult) - 1)
    if side != whole:
        raise ValueError(f"scales {list(tokenizer.patch_nums)} are of images of {whole} pixels, not {side}")
    shared = ("vocab_size", "code_width", "patch_nums")
    return {name: getattr(tokenizer, name) for name in shared}


def build_teacher(
    config: VARConfig, tokenizer: Tokenizer, state: Mapping[str, Tensor] | None, recipe: Recipe
) -> Teacher:
    return Teacher(build_backbone(config, tokenizer, state), tokenizer, family=FAMILY, recipe=recipe)


def build_student(
    config: VARConfig,
    tokenizer: Tokenizer,
    state: Mapping[str, Tensor] | None,
    **options: Any,
) -> Student:
    """Without a state the weights are random; `options` are those of the student's kind, see `Student.options`."""
    scales = check_tokenizer(config, tokenizer)

    def make() -> Student:
        backbone = VARTransformer(config, scales)
        if state is None:
            backbone.initialize()
        return new_student(backbone, tokenizer, layerwise=True, **options)

    return built(make, state, "student of this config")


def student_config(teacher: Teacher, depth: int | None, *, shifted: bool = False) -> VARConfig:
    """The sizes of a student of this teacher; a `ShiftedStudent` stands at its teacher's own positions."""
    assert isinstance(teacher.backbone, VARTransformer)
    config = teacher.backbone.config
    return dataclasses.replace(config, own_positions=not shifted, depth=depth or config.depth)


# --- upstream states ------------------------------------------------------------------------------------------

DERIVED = ("lvl_1L", "attn_bias_for_masking")
"""Upstream's buffers that follow from the scales: checked, not used."""


def patch_nums_of(state: Mapping[str, Tensor], given: tuple[int, ...] | None, *, leading: bool) -> tuple[int, ...]:
    """The scales of a transformer's state, without a student's leading one.

    They are read from its `lvl_1L`, or are the published ones of the same number and length; `given` must agree.

    Raises:
        ValueError: they are not known, or not those given.
    """
    extra = 1 if leading else 0
    scales, length = len(state["lvl_embed.weight"]) - extra, state["pos_1LC"].shape[1] - extra
    found = None
    if "lvl_1L" in state:
        levels = state["lvl_1L"].flatten().long()
        if levels.numel() and not (int(levels.min()) >= 0 and int(levels.max()) < scales + extra):
            raise ValueError(f"lvl_1L of this state names scales beyond its {scales}")
        counts = levels.bincount().tolist()[extra:]
        found = tuple(math.isqrt(count) for count in counts)
    if given is None:
        fitting = [p for p in PUBLISHED_PATCH_NUMS if len(p) == scales and sum(n * n for n in p) == length]
        given = found or next(iter(fitting), None)
        if given is None:
            raise ValueError(f"no published patch_nums have {scales} scales and {length} tokens; give them")
    if not isinstance(given, Sequence) or not all(type(side) is int for side in given):
        raise ValueError(f"patch_nums must be a sequence of whole numbers, got {shown(given)}")
    given = tuple(given)
    if len(given) != scales or sum(n * n for n in given) != length or (found is not None and found != given):
        known = f" {list(found)}" if found else ""
        raise ValueError(f"patch_nums {list(given)} do not fit: the state has {scales} scales{known}, {length} tokens")
    return given


def transformer_config(
    state: Mapping[str, Tensor], patch_nums: tuple[int, ...] | None = None, *, own_positions: bool = False
) -> VARConfig:
    """Sizes from shapes.

    Raises:
        ValueError: the state is no VAR transformer.
    """
    try:
        width, code_width = shape_of(state, "word_embed.weight", 2)
        vocab_size, _ = shape_of(state, "head.weight", 2)
        labels, _ = shape_of(state, "class_emb.weight", 2)
        mlp_width, _ = shape_of(state, "blocks.0.ffn.fc1.weight", 2)
        depth = count_of(state, "blocks.")
        heads = max(1, width // 64)
        if unit := "blocks.0.attn.scale_mul_1H11" in state:
            _, heads, _, _ = shape_of(state, "blocks.0.attn.scale_mul_1H11", 4)
        shape_of(state, "lvl_embed.weight", 2), shape_of(state, "pos_1LC", 3)
    except ValueError as error:
        raise ValueError(f"this state is no VAR transformer: {error}") from None
    return VARConfig(
        vocab_size=vocab_size,
        code_width=code_width,
        width=width,
        depth=depth,
        heads=heads,
        patch_nums=patch_nums_of(state, patch_nums, leading=own_positions),
        num_classes=labels - 1,
        mlp_width=mlp_width,
        shared_modulation="shared_ada_lin.1.weight" in state,
        unit_attention=unit,
        own_positions=own_positions,
    )


def own_transformer_state(state: Mapping[str, Tensor], config: VARConfig) -> dict[str, Tensor]:
    """A transformer's state without upstream's derived buffers, and with the constant one that EMA files lack.

    Raises:
        ValueError: a derived buffer is not what the scales give.
    """
    for name in DERIVED:
        if name in state and not torch.equal(state[name].float(), derived_buffer(name, config)):
            raise ValueError(f"{name} of this state does not belong to patch_nums {list(config.patch_nums)}")
    own = {name: tensor for name, tensor in state.items() if name not in DERIVED}
    for i in range(config.depth):
        own.setdefault(f"blocks.{i}.attn.zero_k_bias", torch.zeros(config.width))
    return own


def derived_buffer(name: str, config: VARConfig) -> Tensor:
    """fp32 `lvl_1L` [1,P+L] or `attn_bias_for_masking` [1,1,P+L,P+L] of upstream."""
    level_1N = torch.arange(len(config.levels)).repeat_interleave(torch.tensor(config.levels))[None].float()
    if name == "lvl_1L":
        return level_1N
    key_1N, query_N1 = level_1N, level_1N.T
    visible = query_N1 > key_1N if config.own_positions else query_N1 >= key_1N
    visible.fill_diagonal_(True)
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)[None, None]


def tokenizer_config(state: Mapping[str, Tensor], patch_nums: tuple[int, ...]) -> MultiScaleVQConfig:
    """Sizes of a tokenizer from the shapes of its (our) state.

    Raises:
        ValueError: the state is no VAR tokenizer.
    """
    try:
        vocab_size, code_width = shape_of(state, "quantize.embedding.weight", 2)
        convs = sum(bool(re.fullmatch(r"quantize\.quant_resi\.qresi_ls\.\d+\.weight", n)) for n in state)
        return MultiScaleVQConfig(
            patch_nums=patch_nums,
            vocab_size=vocab_size,
            code_width=code_width,
            shared_convs=convs,
            recorded_scales=shape_of(state, "quantize.ema_vocab_hit_SV", 2)[0],
            **encoder_sizes(state),
        )
    except ValueError as error:
        raise ValueError(f"this state is no VAR tokenizer: {error}") from None


# --- adapters -------------------------------------------------------------------------------------------------


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """Which of `ADAPTERS` a state belongs to, by its names; None is none of them."""
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in state):
        return "var-tokenizer"
    if not any(name.startswith(("word_embed.", "lvl_embed.", "blocks.")) for name in state):
        return None
    return "dd1-var" if is_student(state) else "var"


def blank_backbone(config: VARConfig) -> VARTransformer:
    sizes = MultiScaleVQConfig(patch_nums=config.patch_nums, vocab_size=config.vocab_size, code_width=config.code_width)
    return VARTransformer(config, MultiScaleVQ(sizes))


def blank_student(config: VARConfig) -> DD1Student:
    backbone = blank_backbone(config)
    return DD1Student(backbone, backbone.tokenizer, starts=(0,), split=0, layerwise=True)


def upstream_tokenizer_config(
    state: Mapping[str, Tensor], patch_nums: tuple[int, ...] = PUBLISHED_PATCH_NUMS[0]
) -> MultiScaleVQConfig:
    """`tokenizer_config` of a state under upstream's names."""
    return tokenizer_config(own_tokenizer_state(state), patch_nums)


def derived_buffers(config: VARConfig) -> dict[str, Tensor]:
    """Upstream's buffers in its own types."""
    level_1N, bias_11NN = (derived_buffer(name, config) for name in DERIVED)
    return dict(zip(DERIVED, (level_1N.long(), bias_11NN), strict=True))


OPTIONAL = rf"{'|'.join(DERIVED)}|blocks\.\d+\.attn\.zero_k_bias"
ADAPTERS = {
    "var": Adapter(
        title="VAR transformer",
        part="teacher",
        labels="class_emb.weight",
        preferred=("trainer", "var_wo_ddp"),
        optional=OPTIONAL,
        config=transformer_config,
        blank=blank_backbone,
        rename=own_transformer_state,
        restore=dict,
        derived=derived_buffers,
    ),
    "dd1-var": Adapter(
        title="DD1 student of a VAR transformer",
        part="student",
        labels="class_emb.weight",
        preferred=("trainer", "ema_parameters", "var_wo_ddp", "ema"),
        optional=OPTIONAL,
        config=functools.partial(transformer_config, own_positions=True),
        blank=blank_student,
        rename=lambda state, config: own_student_state(own_transformer_state(state, config)),
        restore=upstream_student_state,
        derived=derived_buffers,
    ),
    "var-tokenizer": Adapter(
        title="VAR tokenizer",
        part="tokenizer",
        preferred=("trainer", "vae_local"),
        config=upstream_tokenizer_config,
        blank=MultiScaleVQ,
        rename=lambda state, config: own_tokenizer_state(state),
        restore=upstream_tokenizer_state,
    ),
}
"""How upstream's states of this family are read and written."""
SIZE_OPTIONS = ("patch_nums",)
"""Sizes that a state may not tell."""
TOKENIZER_SIZES = ("patch_nums",)
"""Of a transformer's sizes, those that its tokenizer's state does not tell."""


def pairs_recipe(config: VARConfig) -> Recipe:
    """How a published teacher's pairs are made (DD1, arXiv 2412.17153)."""
    return Recipe(guidance_scale=2.0, top_k=900, top_p=0.95)


def student_spans(config: VARConfig) -> tuple[tuple[int, ...], int]:
    """Starts and split of a published student: scale 5 of d16, 4 of d20 and d24, which d30 follows; else the middle
    scale."""
    published = {16: 5, 20: 4, 24: 4, 30: 4} if config.patch_nums == PUBLISHED_PATCH_NUMS[0] else {}
    begin = sum(config.steps[: published.get(config.depth, len(config.steps) // 2)])
    return tuple(sorted({0, begin})), begin


# --- loading --------------------------------------------------------------------------------------------------


def load_tokenizer(source: StateOrPath, patch_nums: tuple[int, ...]) -> MultiScaleVQ:
    """A multi-scale tokenizer from upstream's state or file, in evaluation mode, fp32, on the CPU."""
    return build_tokenizer(*ADAPTERS["var-tokenizer"].read(source, patch_nums=patch_nums))


def load_var(model: StateOrPath, tokenizer: StateOrPath, patch_nums: tuple[int, ...] | None = None) -> Teacher:
    """A VAR teacher from upstream's states or files.

    Args:
        model: the transformer.
        tokenizer: the multi-scale VQ model.
        patch_nums: side of the token grid at each scale; None is the published tuple that fits the shapes.

    Returns:
        A `Teacher` in evaluation mode, fp32, on the CPU.

    Raises:
        ValueError: keys are missing, extra or misshapen, or the scales do not fit.
    """
    config, state = ADAPTERS["var"].read(model, patch_nums=patch_nums)
    return build_teacher(config, load_tokenizer(tokenizer, config.patch_nums), state, Recipe())


def load_var_student(
    model: StateOrPath, tokenizer: Tokenizer, patch_nums: tuple[int, ...] | None, split: int
) -> Student:
    """A DD1 student from the published layout (`{'trainer': {'ema_parameters': ...}}` or the bare state); its starts
    are those of `student_spans`."""
    config, state = ADAPTERS["dd1-var"].read(model, patch_nums=patch_nums)
    return build_student(config, tokenizer, state, starts=student_spans(config)[0], split=split)
