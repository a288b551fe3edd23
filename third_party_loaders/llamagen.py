"""LlamaGen teachers and their DD1 students, assembled from upstream-named states or from our directory format.

B batch, L token positions, V codes, C code width, D model width.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ddecode.arguments import check_kind, check_whole
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
from third_party_loaders.llamagen_tokenizer import VQConfig, VQModel
from third_party_loaders.llamagen_transformer import LlamaGenTransformer, TransformerConfig
from third_party_loaders.state import StateOrPath, built

FAMILY = "llamagen"
PUBLISHED_HEADS = {
    (768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1536, 48): 24, (2560, 48): 40,
    (2048, 22): 32, (3200, 24): 32, (4096, 32): 32,
}  # fmt: skip
"""Heads by (width, depth) of B, L, XL, XXL, XXXL, 1B, 3B and 7B: in no state dict."""

# --- our directory format -------------------------------------------------------------------------------------


TokenizerConfig = VQConfig
"""What the `tokenizer` group of a `config.json` holds."""
BackboneConfig = TransformerConfig
"""What its `backbone` groups hold."""


def build_tokenizer(config: VQConfig, state: Mapping[str, Tensor] | None) -> VQModel:
    """Without a state the weights are random."""
    return built(lambda: VQModel(config), state, "LlamaGen tokenizer of this config")


def build_backbone(
    config: TransformerConfig, tokenizer: Tokenizer, state: Mapping[str, Tensor] | None
) -> LlamaGenTransformer:
    """Without a state the weights are random."""

    def make() -> LlamaGenTransformer:
        backbone = LlamaGenTransformer(config)
        if state is None:
            backbone.initialize()
        return backbone

    return built(make, state, "LlamaGen transformer of this config")


def shared_sizes(tokenizer: VQConfig, side: int) -> dict[str, Any]:
    """What a teacher's sizes have to be for this tokenizer and images of `side` pixels.

    Raises:
        ValueError: such images do not divide into tokens.
    """
    if side % tokenizer.downsampling:
        raise ValueError(f"images of {side} pixels do not divide into tokens of {tokenizer.downsampling}")
    return {"vocab_size": tokenizer.vocab_size, "tokens": (side // tokenizer.downsampling) ** 2}


def check_tokenizer(config: TransformerConfig, tokenizer: Tokenizer) -> None:
    """
    Raises:
        ValueError: it is none, or has other codes than the model.
    """
    check_kind("a model's tokenizer", tokenizer, Tokenizer)
    codes = tokenizer.codebook_VC
    if len(codes) != config.vocab_size or config.code_width not in (None, codes.shape[1]):
        ours = f"{config.vocab_size} codes" + (f" of width {config.code_width}" if config.code_width else "")
        raise ValueError(f"the model has {ours}, the tokenizer {len(codes)} of width {codes.shape[1]}")


def build_teacher(
    config: TransformerConfig, tokenizer: Tokenizer, state: Mapping[str, Tensor] | None, recipe: Recipe
) -> Teacher:
    return Teacher(build_backbone(config, tokenizer, state), tokenizer, family=FAMILY, recipe=recipe)


def build_student(
    config: TransformerConfig,
    tokenizer: Tokenizer,
    state: Mapping[str, Tensor] | None,
    **options: Any,
) -> Student:
    """Without a state the weights are random; `options` are those of the student's kind, see `Student.options`."""
    check_tokenizer(config, tokenizer)

    def make() -> Student:
        backbone = LlamaGenTransformer(config)
        if state is None:
            backbone.initialize()
        return new_student(backbone, tokenizer, layerwise=False, **options)

    return built(make, state, "student of this config")


def student_config(teacher: Teacher, depth: int | None, *, shifted: bool = False) -> TransformerConfig:
    """The sizes of a student of this teacher; a `ShiftedStudent` reads ids, as its teacher does."""
    assert isinstance(teacher.backbone, LlamaGenTransformer)
    config = teacher.backbone.config
    code_width = None if shifted else teacher.codebook_VC.shape[1]
    return dataclasses.replace(config, code_width=code_width, depth=depth or config.depth)


# --- upstream states ------------------------------------------------------------------------------------------


def transformer_config(
    state: Mapping[str, Tensor], n_head: int | None = None, block_size: int | None = None, *, student: bool = False
) -> TransformerConfig:
    """Sizes from shapes; heads and tokens from the arguments or the published values. A student reads code vectors.

    Raises:
        ValueError: the state is no LlamaGen transformer, or its rotary factors are of another number of tokens.
    """
    try:
        vocab_size, width = shape_of(state, "output.weight", 2)
        mlp_width, _ = shape_of(state, "layers.0.feed_forward.w1.weight", 2)
        _, token_width = shape_of(state, "tok_embeddings.weight", 2)
        depth = count_of(state, "layers.")
    except ValueError as error:
        raise ValueError(f"this state is no LlamaGen transformer: {error}") from None
    for name, value in (("n_head", n_head), ("block_size", block_size)):
        if value is not None:
            check_whole(name, value, 1)
    heads = PUBLISHED_HEADS.get((width, depth)) or max(1, width // 64)
    caption = state.get("cls_embedding.uncond_embedding")
    labels = state.get("cls_embedding.embedding_table.weight")
    if "freqs_cis" in state:  # some files have it: a row for each position, the condition's first
        tokens = shape_of(state, "freqs_cis", 3)[0] - (1 if caption is None else len(caption))
        if block_size not in (None, tokens):
            raise ValueError(f"this LlamaGen transformer has {tokens} tokens by its freqs_cis, not {block_size}")
        block_size = tokens
    return TransformerConfig(
        vocab_size=vocab_size,
        width=width,
        depth=depth,
        heads=heads if n_head is None else n_head,
        tokens=256 if block_size is None else block_size,
        num_classes=len(labels) - 1 if labels is not None else 0,
        code_width=token_width if student else None,
        caption_width=None if caption is None else caption.shape[1],
        caption_length=120 if caption is None else caption.shape[0],
        mlp_width=mlp_width,
    )


def sizes_of_name(file_name: str) -> dict[str, Any]:
    """Tokens of a published file, such as c2i_B_256.pt and c2i_B_384.pt, whose states have the same shapes."""
    pixels = re.fullmatch(r"[ct]2i_\w+_(256|384|512)\.\w+", file_name)
    return {"block_size": (int(pixels[1]) // 16) ** 2} if pixels else {}


def tokenizer_config(state: Mapping[str, Tensor]) -> VQConfig:
    """Sizes of a VQ tokenizer from the shapes of its state.

    Raises:
        ValueError: the state is no LlamaGen tokenizer.
    """
    try:
        vocab_size, code_width = shape_of(state, "quantize.embedding.weight", 2)
        z_channels, *_ = shape_of(state, "encoder.conv_out.weight", 4)
        encoder = encoder_sizes(state)
    except ValueError as error:
        raise ValueError(f"this state is no LlamaGen tokenizer: {error}") from None
    return VQConfig(vocab_size=vocab_size, code_width=code_width, z_channels=z_channels, **encoder)


def own_tokenizer_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's tokenizer state with the usage record that some files lack."""
    return {"quantize.codebook_used": VQModel.unused_record(), **state}


def own_transformer_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's state without the rotary factors that some files carry: they follow from the sizes."""
    return {name: tensor for name, tensor in state.items() if name != "freqs_cis"}


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """Which of `ADAPTERS` a state belongs to, by its names; None is none of them."""
    if any(name.startswith(("encoder.conv_blocks.", "decoder.conv_blocks.")) for name in state):
        return "llamagen-tokenizer"
    if not any(name.startswith(("tok_embeddings.", "layers.")) for name in state):
        return None
    return "dd1-llamagen" if is_student(state) else "llamagen"


def blank_student(config: TransformerConfig) -> DD1Student:
    assert config.code_width is not None
    tokenizer = VQModel(VQConfig(vocab_size=config.vocab_size, code_width=config.code_width))
    return DD1Student(LlamaGenTransformer(config), tokenizer, starts=(0,), split=0)


ADAPTERS = {
    "llamagen": Adapter(
        title="LlamaGen transformer",
        part="teacher",
        labels="cls_embedding.embedding_table.weight",
        optional="freqs_cis",
        config=transformer_config,
        told=sizes_of_name,
        blank=LlamaGenTransformer,
        rename=lambda state, config: own_transformer_state(state),
        restore=dict,
    ),
    "dd1-llamagen": Adapter(
        title="DD1 student of a LlamaGen transformer",
        part="student",
        labels="cls_embedding.embedding_table.weight",
        preferred=("ema",),
        optional="freqs_cis",
        config=functools.partial(transformer_config, student=True),
        blank=blank_student,
        rename=lambda state, config: own_student_state(own_transformer_state(state)),
        restore=upstream_student_state,
    ),
    "llamagen-tokenizer": Adapter(
        title="LlamaGen tokenizer",
        part="tokenizer",
        optional=r"quantize\.codebook_used",
        config=tokenizer_config,
        blank=VQModel,
        rename=lambda state, config: own_tokenizer_state(state),
        restore=dict,
    ),
}
"""How upstream's states of this family are read and written."""
SIZE_OPTIONS = ("n_head", "block_size")
"""Sizes that no state tells."""
TOKENIZER_SIZES = ()
"""Of a transformer's sizes, those that its tokenizer's state does not tell."""


def pairs_recipe(config: TransformerConfig) -> Recipe:
    """How a published teacher's pairs are made (DD2, arXiv 2510.21003); from captions, upstream's own sampling."""
    if config.caption_width is not None:
        return Recipe(guidance_scale=7.5, top_k=1000)
    return Recipe(guidance_scale=2.0, top_k=8000)


def student_spans(config: TransformerConfig) -> tuple[tuple[int, ...], int]:
    """Starts and split of the published students B and L; larger ones follow L, other lengths begin at a third."""
    if config.tokens == 256:
        return (0, 80), 80 if config.width == 768 else 130
    third = config.tokens // 3
    return tuple(sorted({0, third})), third


# --- loading --------------------------------------------------------------------------------------------------


def load_tokenizer(source: StateOrPath) -> VQModel:
    """A VQ tokenizer from upstream's state or file, in evaluation mode, fp32, on the CPU."""
    return build_tokenizer(*ADAPTERS["llamagen-tokenizer"].read(source))


def load_llamagen(
    model: StateOrPath, tokenizer: StateOrPath | Tokenizer, n_head: int | None = None, block_size: int | None = None
) -> Teacher:
    """A LlamaGen teacher from upstream's states or files.

    Args:
        model: the transformer; c2i or t2i by its keys.
        tokenizer: the VQ model, or a tokenizer of one's own.
        n_head: attention heads; None is the published number for a published (width, depth), else head width 64.
        block_size: L; None is as the file has it in its rotary factors or, published, in its name (c2i_XL_384.pt: 576),
            else 256.

    Returns:
        A `Teacher` in evaluation mode, fp32, on the CPU.

    Raises:
        ValueError: keys are missing, extra or misshapen.
    """
    config, state = ADAPTERS["llamagen"].read(model, n_head=n_head, block_size=block_size)
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    return build_teacher(config, loaded, state, Recipe())


def load_llamagen_student(
    model: StateOrPath, tokenizer: Tokenizer, n_head: int | None, block_size: int | None, split: int
) -> Student:
    """A DD1 student from the published layout (`{'ema': ..., 'model': ...}` or the bare state); its starts are those
    of `student_spans`."""
    config, state = ADAPTERS["dd1-llamagen"].read(model, n_head=n_head, block_size=block_size)
    return build_student(config, tokenizer, state, starts=student_spans(config)[0], split=split)
