"""The published models' sizes by name, for recipes, checks and benchmarks with random weights."""

from dataclasses import dataclass
from typing import Any

from third_party_loaders.llamagen_tokenizer import VQConfig
from third_party_loaders.llamagen_transformer import TransformerConfig
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


def var(depth: int, patch_nums: tuple[int, ...] = PUBLISHED_PATCH_NUMS[0]) -> Architecture:
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
    return Architecture(family="var", backbone=backbone, tokenizer=tokenizer)


def llamagen(width: int, depth: int, heads: int, *, captions: bool = False) -> Architecture:
    """LlamaGen at 256 pixels, from class labels or T5 features."""
    backbone = TransformerConfig(
        vocab_size=16384,
        width=width,
        depth=depth,
        heads=heads,
        num_classes=0 if captions else 1000,
        caption_width=2048 if captions else None,
    )
    return Architecture(family="llamagen", backbone=backbone, tokenizer=VQConfig())


ARCHITECTURES = {
    "var-d16": var(16),
    "var-d20": var(20),
    "var-d24": var(24),
    "var-d30": var(30),
    "var-d36": var(36, PUBLISHED_PATCH_NUMS[1]),
    "llamagen-b": llamagen(768, 12, 12),
    "llamagen-l": llamagen(1024, 24, 16),
    "llamagen-xl": llamagen(1280, 36, 20),
    "llamagen-xxl": llamagen(1536, 48, 24),
    "llamagen-3b": llamagen(3200, 24, 32),
    "llamagen-t2i-xl": llamagen(1280, 36, 20, captions=True),
}
