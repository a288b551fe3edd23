"""The published models' sizes by name, and models of these sizes with random weights, for benchmarks and checks."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddecode.arguments import check_kind
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher
from ddecode.types import Tokenizer
from third_party_loaders import llamagen, var
from third_party_loaders.llamagen_tokenizer import VQConfig
from third_party_loaders.llamagen_transformer import TransformerConfig
from third_party_loaders.state import ModuleType, meta_module
from third_party_loaders.var import PUBLISHED_PATCH_NUMS
from third_party_loaders.var_tokenizer import MultiScaleVQConfig
from third_party_loaders.var_transformer import VARConfig


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One published teacher."""

    family: str
    backbone: Any
    """The family's `BackboneConfig`."""
    tokenizer: Any
    """Its `TokenizerConfig`."""
    recipe: Recipe
    """How its authors sample it for the figures they publish."""


def var_sizes(depth: int, patch_nums: tuple[int, ...] = PUBLISHED_PATCH_NUMS[0]) -> Architecture:
    """VAR at so many layers: 64 times as wide, a head for every layer; d36 shares one modulation map."""
    tokenizer = MultiScaleVQConfig(patch_nums=patch_nums)
    backbone = VARConfig(
        vocab_size=tokenizer.vocab_size,
        code_width=tokenizer.code_width,
        width=64 * depth,
        depth=depth,
        heads=depth,
        patch_nums=patch_nums,
        shared_modulation=depth == 36,
    )
    recipe = Recipe(guidance_scale=1.5, top_k=900, top_p=0.96)
    return Architecture(family="var", backbone=backbone, tokenizer=tokenizer, recipe=recipe)


def llamagen_sizes(width: int, depth: int, heads: int, recipe: Recipe, *, captions: bool = False) -> Architecture:
    """LlamaGen at 256 pixels, from class labels or T5 features."""
    backbone = TransformerConfig(
        vocab_size=16384,
        width=width,
        depth=depth,
        heads=heads,
        num_classes=0 if captions else 1000,
        caption_width=2048 if captions else None,
    )
    return Architecture(family="llamagen", backbone=backbone, tokenizer=VQConfig(), recipe=recipe)


ARCHITECTURES = {
    "var-d16": var_sizes(16),
    "var-d20": var_sizes(20),
    "var-d24": var_sizes(24),
    "var-d30": var_sizes(30),
    "var-d36": var_sizes(36, PUBLISHED_PATCH_NUMS[1]),
    "llamagen-b": llamagen_sizes(768, 12, 12, Recipe(guidance_scale=2.0)),
    "llamagen-l": llamagen_sizes(1024, 24, 16, Recipe(guidance_scale=2.0)),
    "llamagen-xl": llamagen_sizes(1280, 36, 20, Recipe(guidance_scale=1.75)),
    "llamagen-xxl": llamagen_sizes(1536, 48, 24, Recipe(guidance_scale=1.75)),
    "llamagen-3b": llamagen_sizes(3200, 24, 32, Recipe(guidance_scale=1.65)),
    "llamagen-t2i-xl": llamagen_sizes(1280, 36, 20, Recipe(guidance_scale=7.5, top_k=1000), captions=True),
}


def find(name: str) -> Architecture:
    """A published architecture.

    Raises:
        ValueError: there is none of this name; the nearest is named.
    """
    check_kind("an architecture", name, str)
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown architecture {name!r}; did you mean {near}? There are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def smallest(architecture: Architecture) -> Architecture | None:
    """The smallest published teacher of the same tokens and conditions; None if it is this one."""
    least = min(
        (a for a in ARCHITECTURES.values() if tokens_of(a) == tokens_of(architecture)),
        key=lambda a: a.backbone.width * a.backbone.depth,
    )
    return None if least == architecture else least


def tokens_of(architecture: Architecture) -> tuple[Any, ...]:
    """What models must share to continue each other's tokens."""
    return architecture.family, architecture.tokenizer, architecture.backbone.num_classes


# --- random weights -------------------------------------------------------------------------------------------


def random_tokenizer(architecture: Architecture, generator: torch.Generator) -> Tokenizer:
    """Its tokenizer with random weights; see `with_random_weights`."""
    family = module_of(architecture.family)
    return with_random_weights(lambda state: family.build_tokenizer(architecture.tokenizer, state), generator)


def random_teacher(architecture: Architecture, tokenizer: Tokenizer, generator: torch.Generator) -> Teacher:
    """The teacher with random weights and its authors' recipe."""
    family = module_of(architecture.family)
    backbone = with_random_weights(
        lambda state: family.build_backbone(architecture.backbone, tokenizer, state), generator
    )
    return Teacher(backbone, tokenizer, family=architecture.family, recipe=architecture.recipe)


def random_student(teacher: Teacher, generator: torch.Generator, *, layers: int | None = None) -> Student:
    """The DD1 student that is published for a teacher, or would be, with random weights.

    Args:
        teacher: its sizes and tokenizer are taken.
        layers: None is as many as the teacher has.

    Raises:
        ValueError: the teacher takes captions, or has fewer layers.
    """
    family = module_of(teacher.family)
    if not teacher.num_classes:
        raise ValueError("there is no student for captions: measure the teacher alone")
    if layers is not None and not 1 <= layers <= teacher.backbone.depth:
        raise ValueError(f"a student of {layers} layers cannot be cut from a teacher of {teacher.backbone.depth}")
    config = family.student_config(teacher, layers)
    starts, split = family.student_spans(family.student_config(teacher, None))
    return with_random_weights(
        lambda state: family.build_student(config, teacher.tokenizer, state, starts=starts, split=split), generator
    )


def module_of(family: str) -> Any:
    return {"llamagen": llamagen, "var": var}[family]


def with_random_weights(
    build: Callable[[dict[str, Tensor] | None], ModuleType], generator: torch.Generator
) -> ModuleType:
    """Build a module with weights under which every part matters and signals keep their size.

    Fresh models would do for timing, but not for accuracy: their heads are zero and their gates all but shut. Here
    matrices have rows of norm one, norms are neutral, biases small, and buffers zero, as upstream's are.

    Args:
        build: the module from a state; from None one whose state is to be filled.
        generator: a CPU generator.
    """
    blank = meta_module(lambda: build(None))
    buffers = {name for name, _ in blank.named_buffers()}
    return build(
        {
            name: torch.zeros(tensor.shape) if name in buffers else random_values(name, tensor.shape, generator)
            for name, tensor in blank.state_dict().items()
        }
    )


def random_values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """fp32 weights of one parameter."""
    if len(shape) == 1:
        return 0.1 * torch.randn(shape, generator=generator) if name.endswith("bias") else torch.ones(shape)
    return torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
