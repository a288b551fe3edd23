"""LlamaGen teachers and their DD1 students, assembled from upstream-named states or from our directory format.

B batch, L token positions, V codes, C code width, D model width.
"""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher
from ddecode.types import Tokenizer
from third_party_loaders.llamagen_tokenizer import VQConfig, VQModel
from third_party_loaders.llamagen_transformer import LlamaGenTransformer, TransformerConfig
from third_party_loaders.state import StateOrPath, load_strictly, read_state

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
    model = VQModel(config)
    if state is not None:
        load_strictly(model, state, "LlamaGen tokenizer of this config")
    return model.eval()


def build_backbone(config: TransformerConfig, state: Mapping[str, Tensor] | None) -> LlamaGenTransformer:
    """Without a state the weights are random."""
    backbone = LlamaGenTransformer(config)
    if state is not None:
        load_strictly(backbone, state, "LlamaGen transformer of this config")
    else:
        backbone.initialize()
    return backbone.eval()


def build_teacher(
    config: TransformerConfig, tokenizer: Tokenizer, state: Mapping[str, Tensor] | None, recipe: Recipe
) -> Teacher:
    return Teacher(build_backbone(config, state), tokenizer, family=FAMILY, recipe=recipe)


def build_student(
    config: TransformerConfig,
    tokenizer: Tokenizer,
    state: Mapping[str, Tensor] | None,
    *,
    starts: tuple[int, ...],
    split: int,
) -> Student:
    student = Student(build_backbone(config, None), tokenizer, starts=starts, split=split)
    if state is not None:
        load_strictly(student, state, "student of this config")
    return student.eval()


def student_config(teacher: Teacher, depth: int | None) -> TransformerConfig:
    """The sizes of a student of this teacher."""
    assert isinstance(teacher.backbone, LlamaGenTransformer)
    config = teacher.backbone.config
    code_width = teacher.codebook_VC.shape[1]
    return dataclasses.replace(config, code_width=code_width, depth=depth or config.depth)


# --- upstream states ------------------------------------------------------------------------------------------


def transformer_config(
    state: Mapping[str, Tensor],
    n_head: int | None,
    block_size: int | None,
    *,
    tokens_key: str = "tok_embeddings.weight",
) -> TransformerConfig:
    """Sizes from shapes; heads and tokens from the arguments or the published values.

    Raises:
        ValueError: the state is no LlamaGen transformer.
    """
    try:
        vocab_size, width = state["output.weight"].shape
        mlp_width = state["layers.0.feed_forward.w1.weight"].shape[0]
        token_shape = state[tokens_key].shape
    except KeyError as error:
        raise ValueError(f"this state is no LlamaGen transformer: it lacks {error.args[0]}") from None
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    heads = n_head or PUBLISHED_HEADS.get((width, depth)) or max(1, width // 64)
    caption = state.get("cls_embedding.uncond_embedding")
    labels = state.get("cls_embedding.embedding_table.weight")
    return TransformerConfig(
        vocab_size=vocab_size,
        width=width,
        depth=depth,
        heads=heads,
        tokens=block_size or 256,
        num_classes=len(labels) - 1 if labels is not None else 0,
        code_width=token_shape[1] if token_shape[0] == width and "tok_embeddings.bias" in state else None,
        caption_width=None if caption is None else caption.shape[1],
        caption_length=120 if caption is None else caption.shape[0],
        mlp_width=mlp_width,
    )


def tokenizer_config(state: Mapping[str, Tensor]) -> VQConfig:
    """Sizes of a VQ tokenizer from the shapes of its state.

    Raises:
        ValueError: the state is no LlamaGen tokenizer.
    """
    try:
        vocab_size, code_width = state["quantize.embedding.weight"].shape
        channels = state["encoder.conv_in.weight"].shape[0]
        z_channels = state["encoder.conv_out.weight"].shape[0]
        levels = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.conv_blocks."))
        widths = [state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
        blocks = 1 + max(int(n.split(".")[4]) for n in state if n.startswith("encoder.conv_blocks.0.res."))
    except (KeyError, ValueError) as error:
        raise ValueError(f"this state is no LlamaGen tokenizer: {error}") from None
    return VQConfig(
        vocab_size=vocab_size,
        code_width=code_width,
        channels=channels,
        channel_mult=tuple(w // channels for w in widths),
        res_blocks=blocks,
        z_channels=z_channels,
    )


def load_tokenizer(source: StateOrPath) -> VQModel:
    """A VQ tokenizer from upstream's state or file, in evaluation mode, fp32, on the CPU."""
    state = read_state(source)
    state.setdefault("quantize.codebook_used", VQModel.unused_record())
    model = VQModel(tokenizer_config(state))
    load_strictly(model, state, "LlamaGen tokenizer")
    return model.eval()


def load_llamagen(
    model: StateOrPath, tokenizer: StateOrPath, n_head: int | None = None, block_size: int | None = None
) -> Teacher:
    """A LlamaGen teacher from upstream's states or files.

    Args:
        model: the transformer; c2i or t2i by its keys.
        tokenizer: the VQ model.
        n_head: attention heads; None is the published number for a published (width, depth), else head width 64.
        block_size: L; None is 256.

    Returns:
        A `Teacher` in evaluation mode, fp32, on the CPU.

    Raises:
        ValueError: keys are missing, extra or misshapen.
    """
    state = read_state(model)
    state.pop("freqs_cis", None)
    backbone = LlamaGenTransformer(transformer_config(state, n_head, block_size))
    load_strictly(backbone, state, "LlamaGen transformer")
    return Teacher(backbone.eval(), load_tokenizer(tokenizer), family=FAMILY)


def load_llamagen_student(
    model: StateOrPath, tokenizer: Tokenizer, n_head: int | None, block_size: int | None, split: int
) -> Student:
    """A DD1 student from the published layout (`{'ema': ..., 'model': ...}` or the bare state)."""
    state = read_state(model, ("ema", "model", "module", "state_dict"))
    backbone = LlamaGenTransformer(transformer_config(state, n_head, block_size))
    student = Student(backbone, tokenizer, starts=(0,), split=split)
    load_strictly(student, {own_name(name): tensor for name, tensor in state.items()}, "LlamaGen DD1 student")
    return student.eval()


def own_name(upstream: str) -> str:
    """The name in a `Student` of a parameter of upstream's DD1 transformer."""
    for theirs, ours in (("n_d_embed.", "indicator."), ("final_layer_conti.", "continuous_head.")):
        if upstream.startswith(theirs):
            return ours + upstream.removeprefix(theirs)
    return f"backbone.{upstream}"


def upstream_name(own: str) -> str:
    """The inverse of `own_name`."""
    for theirs, ours in (("n_d_embed.", "indicator."), ("final_layer_conti.", "continuous_head."), ("", "backbone.")):
        if own.startswith(ours):
            return theirs + own.removeprefix(ours)
    raise ValueError(f"{own} is no parameter of a student")
