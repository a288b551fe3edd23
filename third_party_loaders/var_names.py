"""Names of VAR's tokenizer: upstream's, and ours, which are those of LlamaGen's."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

TOKENIZER_NAMES = (
    ("encoder.down.{}.block.{}.", "encoder.conv_blocks.{}.res.{}."),
    ("encoder.down.{}.attn.{}.", "encoder.conv_blocks.{}.attn.{}."),
    ("encoder.down.{}.downsample.", "encoder.conv_blocks.{}.downsample."),
    ("decoder.up.{}.block.{}.", "decoder.conv_blocks.{}.res.{}."),
    ("decoder.up.{}.attn.{}.", "decoder.conv_blocks.{}.attn.{}."),
    ("decoder.up.{}.upsample.", "decoder.conv_blocks.{}.upsample."),
    ("encoder.mid.block_1.", "encoder.mid.0."),
    ("encoder.mid.attn_1.", "encoder.mid.1."),
    ("encoder.mid.block_2.", "encoder.mid.2."),
    ("decoder.mid.block_1.", "decoder.mid.0."),
    ("decoder.mid.attn_1.", "decoder.mid.1."),
    ("decoder.mid.block_2.", "decoder.mid.2."),
)
"""Beginnings of upstream's parameter names and of ours. Upstream counts the decoder's levels from the finest."""


def renamed(name: str, names: tuple[tuple[str, str], ...], levels: int) -> str:
    """A name with its beginning replaced; the decoder's level is counted from the other end."""
    for before, after in names:
        match = re.match(re.escape(before).replace(r"\{\}", r"(\d+)"), name)
        if match:
            numbers = list(map(int, match.groups()))
            if before.startswith("decoder") and numbers:
                numbers[0] = levels - 1 - numbers[0]
            return after.format(*numbers) + name[match.end() :]
    return name


def own_tokenizer_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's tokenizer state under our names, attention's fused map cut into three."""
    levels = len({n.split(".")[2] for n in state if n.startswith("decoder.up.")})
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = renamed(name, TOKENIZER_NAMES, levels)
        if ".qkv." in ours:
            if tensor.dim() == 0 or len(tensor) % 3:
                raise ValueError(f"misshapen {name} is {tuple(tensor.shape)}, expected three maps in one")
            own |= {ours.replace("qkv", part): third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            own[ours] = tensor
    return own


def upstream_tokenizer_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `own_tokenizer_state`."""
    levels = len({n.split(".")[2] for n in state if n.startswith("decoder.conv_blocks.")})
    swapped = tuple((ours, theirs) for theirs, ours in TOKENIZER_NAMES)
    upstream: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = renamed(name, swapped, levels)
        part = re.search(r"\.([qkv])\.(weight|bias)$", name)
        if part is None:
            upstream[theirs] = tensor
        elif part[1] == "q":
            thirds = [state[f"{name[: part.start()]}.{p}.{part[2]}"] for p in "qkv"]
            upstream[f"{theirs[: -len(part[0])]}.qkv.{part[2]}"] = torch.cat(thirds)
    return upstream
