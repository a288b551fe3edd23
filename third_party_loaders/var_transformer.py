"""VAR's transformer (arXiv 2404.02905): next-scale prediction with adaptive layer norms.

Attribute names follow upstream's state dict; sizes are arguments. The module holds no dropout and drops no labels.

B batch, L token positions, P condition positions, N positions of one call, S scales, V codes, C code width,
D model width, H heads, d head width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.arguments import check_sizes
from ddecode.linear import Linear, linear
from ddecode.student import renumber_layers
from ddecode.types import Condition, KeyValueCache, compute_dtype
from third_party_loaders.attention import attend
from third_party_loaders.var_tokenizer import MultiScaleVQ

MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """Sizes of a `VARTransformer`."""

    vocab_size: int
    code_width: int
    width: int
    depth: int
    heads: int
    patch_nums: tuple[int, ...]
    """Side of the token grid at each scale."""
    num_classes: int = 1000
    mlp_width: int | None = None
    """None: 4 times the width."""
    shared_modulation: bool = False
    """One class-to-modulation map for all blocks (d36) instead of one in each."""
    unit_attention: bool = True
    """Queries and keys of unit length, with a learned scale for each head."""
    own_positions: bool = False
    """False: a teacher; the class vector stands at the first scale and every position sees its own scale.
    True: the body of a DD1 student; the class stands on a scale of its own in front, so that each token is read where
    its noise stands, and a position sees earlier scales and itself."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide over {self.heads} heads")
        if not self.patch_nums or min(self.patch_nums) < 1:
            raise ValueError(f"patch_nums must be positive, got {list(self.patch_nums)}")

    @property
    def steps(self) -> tuple[int, ...]:
        """Tokens of each scale; they sum to L."""
        return tuple(side * side for side in self.patch_nums)

    @property
    def levels(self) -> tuple[int, ...]:
        """Positions of each scale as the network counts them, condition included."""
        return (1, *self.steps) if self.own_positions else self.steps


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """`zero_k_bias` is upstream's buffer; keys have no bias of their own."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, *, unit: bool) -> None:
        super().__init__()
        self.heads, self.unit = heads, unit
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = Linear(width, width)
        if unit:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))

    def forward(self, x_BND: Tensor, mask: Tensor | None, layer: int, cache: KeyValueCache | None) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = linear(x_BND, self.mat_qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        scale = 0.25 * q.shape[-1] ** -0.5  # upstream's, where attention is not normalised
        if self.unit:
            scale = 1.0
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()
            q, k = q.type_as(v), F.normalize(k, dim=-1)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.proj(rearrange(attend(q, k, v, mask, scale=scale), "b h n d -> b n (h d)"))


def modulate(x_BND: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BND, x_BND.shape[-1:], eps=1e-6), 1 + scale_B1D)


class Block(nn.Module):
    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = Attention(width, config.heads, unit=config.unit_attention)
        self.ffn = FeedForward(width, config.mlp_width or 4 * width)
        if config.shared_modulation:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def modulation(self, class_BD: Tensor, shared_B16D: Tensor | None) -> Tensor:
        """Two gates, two scales, two shifts: [B,1,6,D]."""
        if shared_B16D is not None:
            return self.ada_gss + shared_B16D
        return rearrange(self.ada_lin(class_BD), "b (six d) -> b 1 six d", six=6)

    def forward(
        self,
        x_BND: Tensor,
        modulation_B16D: Tensor,
        mask: Tensor | None,
        layer: int,
        cache: KeyValueCache | None,
        residual_BND: Tensor | None,
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_B16D.unbind(2)
        x_BND = x_BND + gate1 * self.attn(modulate(x_BND, scale1, shift1), mask, layer, cache)
        if residual_BND is not None:
            x_BND = x_BND + residual_BND
        return x_BND + gate2 * self.ffn(modulate(x_BND, scale2, shift2))


class HeadNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def modulation(self, class_BD: Tensor) -> Tensor:
        """Scale and shift, [B,1,2,D]."""
        return rearrange(self.ada_lin(class_BD), "b (two d) -> b 1 two d", two=2)


class VARTransformer(nn.Module):
    """VAR as a `Backbone`: one scale per AR step.

    Args:
        config: the sizes.
        tokenizer: whose multi-scale residuals `token_inputs` reads; held, not trained, not in the state dict.
    """

    level_N: Tensor

    def __init__(self, config: VARConfig, tokenizer: MultiScaleVQ) -> None:
        super().__init__()
        self.config = config
        self._tokenizer = [tokenizer]
        self.steps = config.steps
        self.width, self.depth = config.width, config.depth
        self.vocab_size, self.num_classes = config.vocab_size, config.num_classes
        self.prefix, self.positions = config.levels[0], sum(config.levels)

        self.word_embed = Linear(config.code_width, config.width)
        self.class_emb = nn.Embedding(config.num_classes + 1, config.width)
        self.pos_start = nn.Parameter(torch.zeros(1, self.prefix, config.width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, self.positions, config.width))
        self.lvl_embed = nn.Embedding(len(config.levels), config.width)
        self.shared_ada_lin: nn.Module = nn.Identity()
        if config.shared_modulation:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(config.width, 6 * config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(config.width)
        self.head = Linear(config.width, config.vocab_size)
        self.level_at = tuple(level for level, count in enumerate(config.levels) for _ in range(count))
        # derived, so real even while the weights are built on the meta device
        self.register_buffer("level_N", torch.tensor(self.level_at, device="cpu"), persistent=False)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights as VAR does: truncated normals, gates near zero, a small head."""
        std = (1 / self.width / 3) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not name.endswith(("scale_mul_1H11", "ada_gss")):
                nn.init.trunc_normal_(parameter, std=std, generator=generator)
        gain = 0.5
        for name, parameter in self.named_parameters():
            if name == "head.weight":
                parameter.mul_(0.02)
            elif name == "head_nm.ada_lin.1.weight":
                parameter.mul_(gain)
            elif name.endswith((".proj.weight", ".fc2.weight")):
                parameter.div_(math.sqrt(2 * self.depth))
            elif name.startswith("blocks.") and name.endswith((".ada_lin.1.weight", ".ada_gss")):
                two_gates, rest = parameter.view(6, -1).split([2, 4])
                two_gates.mul_(1e-5)
                rest.mul_(gain)

    @property
    def tokenizer(self) -> MultiScaleVQ:
        return self._tokenizer[0]

    def places(self, begin: int, end: int) -> Tensor:
        """Level and position embeddings of a range of positions, [1,N,D]."""
        return self.lvl_embed(self.level_N[begin:end]) + self.pos_1LC[:, begin:end]

    def condition(self, labels_B: Tensor) -> Condition:
        """Labels int64 [B]; `modulation` holds each block's [B,1,6,D], then the head's [B,1,2,D].

        Raises:
            ValueError: they are captions.
        """
        if not isinstance(labels_B, Tensor):
            raise ValueError("this model takes class labels, not captions")
        class_BD: Tensor = self.class_emb(labels_B)
        shared = None
        if self.config.shared_modulation:
            shared = rearrange(self.shared_ada_lin(class_BD), "b (six d) -> b 1 six d", six=6)
        blocks = [block.modulation(class_BD, shared) for block in self.blocks if isinstance(block, Block)]
        return Condition(
            prefix_BPD=class_BD[:, None] + self.pos_start + self.places(0, self.prefix),
            class_BD=class_BD,
            modulation=(*blocks, self.head_nm.modulation(class_BD)),
        )

    def unconditional(self, labels_B: Tensor) -> Tensor:
        return torch.full_like(labels_B, self.num_classes)

    def null_labels(self, batch: int) -> Tensor:
        return torch.full((batch,), self.num_classes, device=self.head.weight.device)

    def guidance_weight(self, scale: float, step: int) -> float:
        """Upstream: `(1 + t) cond - t uncond`, t growing linearly to `scale` at the last scale."""
        return scale * step / max(1, len(self.steps) - 1)

    def token_inputs(self, ids_BN: Tensor, seen: int = 0) -> Tensor:
        """The residual maps of the resolved scales, each averaged down to the grid of the scale that reads it."""
        return self.map_inputs(self.residual_maps(F.embedding(ids_BN, self.tokenizer.codebook_VC))[:, seen:], seen)

    def mixed_inputs(self, ids_BN: Tensor, resolved_BN: Tensor, noise_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Residual maps of codes alone, and of noise alone."""
        open_BN1 = ~resolved_BN[..., None]
        codes_BNC = F.embedding(ids_BN, self.tokenizer.codebook_VC).masked_fill(open_BN1, 0)
        both = torch.cat([codes_BNC, noise_BNC.float().masked_fill(~open_BN1, 0)])
        maps_BMC, noise_BMC = self.residual_maps(both).chunk(2)
        return self.map_inputs(maps_BMC, 0), noise_BMC

    @torch.no_grad()
    def residual_maps(self, vectors_BNC: Tensor) -> Tensor:
        """What the scales after the first read of one vector per token, fp32 [B,M,C]."""
        with torch.autocast(vectors_BNC.device.type, enabled=False):
            return self.tokenizer.next_inputs(vectors_BNC)

    def map_inputs(self, maps_BMC: Tensor, seen: int) -> Tensor:
        """Residual maps behind the first `seen` as input vectors."""
        first = self.prefix + seen
        return self.word_embed(maps_BMC) + self.places(first, first + maps_BMC.shape[1])

    def blank_inputs(self) -> Tensor:
        return self.word_embed.bias + self.places(self.prefix, self.positions)

    def added_inputs(self, ids_BN: Tensor, step: int) -> Tensor:
        with torch.no_grad(), torch.autocast(ids_BN.device.type, enabled=False):
            maps_BMC = self.tokenizer.added_inputs(F.embedding(ids_BN, self.tokenizer.codebook_VC), step)
        return linear(maps_BMC, self.word_embed.weight)

    def vector_inputs(self, sequence_BLC: Tensor) -> Tensor:
        return self.word_embed(sequence_BLC) + self.places(self.prefix, self.prefix + sequence_BLC.shape[1])

    def student_state(self, teacher: "VARTransformer", codebook_VC: Tensor) -> dict[str, Tensor]:
        """The teacher's weights, of fewer layers the evenly spaced ones. With own positions, the scale in front takes
        the teacher's first level and position; the first token's own level and position stay as they are here."""
        state = renumber_layers(teacher.state_dict(), "blocks", teacher.depth, self.depth)
        if not self.config.own_positions:
            return state
        levels, places = state["lvl_embed.weight"], state["pos_1LC"]
        own_level, own_place = self.lvl_embed.weight[1:2], self.pos_1LC[:, 1:2]
        first = teacher.prefix
        if first != 1:
            raise ValueError(f"a DD1 student needs a first scale of one token, this teacher's has {first}")
        state["lvl_embed.weight"] = torch.cat([levels[:1], own_level, levels[1:]])
        state["pos_1LC"] = torch.cat([places[:, :1], own_place, places[:, 1:]], 1)
        return state

    def new_cache(self, batch: int) -> KeyValueCache:
        config, weight = self.config, self.head.weight
        shape = (batch, config.heads, self.positions, config.width // config.heads)
        return KeyValueCache(config.depth, shape, device=weight.device, dtype=compute_dtype(weight))

    def hidden(
        self,
        inputs_BND: Tensor,
        condition: Condition,
        *,
        cache: KeyValueCache | None = None,
        residuals: Sequence[Tensor] | None = None,
        blocks: range | None = None,
    ) -> Tensor:
        seen = 0 if cache is None else cache.length
        stop = seen + inputs_BND.shape[1]
        mask = self.attention_mask(seen, stop)
        h = inputs_BND
        for i in range(self.depth) if blocks is None else blocks:
            block = self.blocks[i]
            h = block(h, condition.modulation[i], mask, i, cache, None if residuals is None else residuals[i])
        if cache is not None:
            cache.length = stop
        return h

    def attention_mask(self, seen: int, stop: int) -> Tensor | None:
        """bool [stop-seen, stop], True where a query may look; None where all may look at all."""
        query_N1, key_1N = self.level_N[seen:stop, None], self.level_N[None, :stop]
        if not self.config.own_positions:
            return None if self.level_at[seen] == self.level_at[stop - 1] else query_N1 >= key_1N
        itself = torch.arange(seen, stop, device=key_1N.device)[:, None] == torch.arange(stop, device=key_1N.device)
        return (query_N1 > key_1N) | itself

    def head_parameters(self) -> list[nn.Parameter]:
        """What `logits` reads."""
        return list(self.head.parameters())

    def logits(self, hidden_BND: Tensor, condition: Condition) -> Tensor:
        scale_B1D, shift_B1D = condition.modulation[-1].unbind(2)
        return self.head(modulate(hidden_BND, scale_B1D, shift_B1D)).float()
