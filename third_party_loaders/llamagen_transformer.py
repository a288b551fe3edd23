"""LlamaGen's transformer (arXiv 2406.06525): a causal Llama over raster-ordered image tokens.

Attribute names follow upstream's state dict; sizes are arguments. The module holds no dropout and draws nothing at
random: label dropping belongs to training.

B batch, L token positions, P condition positions, N positions of one call, V codes, C code width, D model width,
H heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.arguments import check_sizes
from ddecode.linear import Linear
from ddecode.student import renumber_layers
from ddecode.types import Condition, KeyValueCache, compute_dtype
from third_party_loaders.attention import attend


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a `LlamaGenTransformer`."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    tokens: int = 256
    """L, a square number."""
    num_classes: int = 1000
    code_width: int | None = None
    """None: inputs are ids looked up in a table. C: inputs are vectors in R^C through a linear map (students)."""
    caption_width: int | None = None
    """None: class labels. Otherwise the width of caption features."""
    caption_length: int = 120
    mlp_width: int | None = None
    """None: 8/3 of the width, rounded up to a multiple of 256."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"width {self.width} over {self.heads} heads: head width must be a multiple of 4")
        if round(self.tokens**0.5) ** 2 != self.tokens:
            raise ValueError(f"{self.tokens} tokens do not form a square grid")

    @property
    def prefix(self) -> int:
        return 1 if self.caption_width is None else self.caption_length

    @property
    def hidden_width(self) -> int:
        return self.mlp_width or -(-int(8 * self.width / 3) // 256) * 256


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return normed.type_as(x) * self.weight


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden_width, bias=False)
        self.w3 = Linear(width, hidden_width, bias=False)
        self.w2 = Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def fit_input_map(codebook_VC: Tensor, table_VD: Tensor) -> dict[str, Tensor]:
    """Least squares: table ~ codebook @ weight.T + bias. In float64, so that rounding hides the order of sums."""
    codes = F.pad(codebook_VC.double(), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(codes, table_VD.double()).solution.float()
    return {"tok_embeddings.weight": solution[:-1].T.contiguous(), "tok_embeddings.bias": solution[-1].clone()}


def rotary_factors(side: int, head_width: int, prefix: int, base: float = 10000.0) -> Tensor:
    """cos and sin of the 2-D rotary angles, fp32 [P+L, d/2, 2]: rows turn the first half, columns the second.

    Condition positions have both factors zero, as upstream has it: their queries and keys vanish.
    """
    half = head_width // 2
    # on the CPU, so real even while the weights are built on the meta device
    rates = 1.0 / base ** (torch.arange(0, half, 2, device="cpu")[: half // 2].float() / half)
    angles = torch.outer(torch.arange(side, device="cpu"), rates)
    rows = angles[:, None].expand(side, side, -1)
    columns = angles[None, :].expand(side, side, -1)
    grid = rearrange(torch.cat([rows, columns], -1), "h w f -> (h w) f")
    factors = torch.stack([grid.cos(), grid.sin()], -1)
    return torch.cat([factors.new_zeros(prefix, half, 2), factors])


def rotate(x_BNHd: Tensor, factors_Nd2: Tensor) -> Tensor:
    """Turn neighbouring pairs of features by their position's angles: a product of complex numbers, in fp32."""
    pairs = torch.view_as_complex(x_BNHd.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(factors_Nd2.float())[:, None]
    return torch.view_as_real(turned).flatten(-2).type_as(x_BNHd)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = Linear(width, 3 * width, bias=False)
        self.wo = Linear(width, width, bias=False)

    def forward(
        self, x_BND: Tensor, factors: Tensor, mask: Tensor | None, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        q, k, v = self.wqkv(x_BND).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate(q, factors), rotate(k, factors)
        q, k, v = (rearrange(h, "b n h d -> b h n d") for h in (q, k, v))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.wo(
            rearrange(attend(q, k, v, mask, causal=mask is None and x_BND.shape[1] > 1), "b h n d -> b n (h d)")
        )


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config.width, config.heads)
        self.feed_forward = FeedForward(config.width, config.hidden_width)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(
        self,
        x_BND: Tensor,
        factors: Tensor,
        mask: Tensor | None,
        layer: int,
        cache: KeyValueCache | None,
        residual_BND: Tensor | None,
    ) -> Tensor:
        x_BND = x_BND + self.attention(self.attention_norm(x_BND), factors, mask, layer, cache)
        if residual_BND is not None:
            x_BND = x_BND + residual_BND
        return x_BND + self.feed_forward(self.ffn_norm(x_BND))


class LabelEmbedding(nn.Module):
    """Class vectors; the last row is the unconditional one."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B)[:, None]


class CaptionProjection(nn.Module):
    def __init__(self, caption_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(caption_width, width, bias=False)
        self.fc2 = Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Caption features to condition vectors; `uncond_embedding` stands for no caption."""

    uncond_embedding: Tensor

    def __init__(self, caption_width: int, length: int, width: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(caption_width, width)
        self.register_buffer("uncond_embedding", torch.randn(length, caption_width) / caption_width**0.5)

    def forward(self, features_BPE: Tensor) -> Tensor:
        return self.cap_proj(features_BPE)


class LlamaGenTransformer(nn.Module):
    """LlamaGen as a `Backbone`: one token per AR step.

    With `config.code_width` set, `vector_inputs` takes code vectors, and no ids are read: the body of a student.
    """

    factors: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.steps = (1,) * config.tokens
        self.width, self.depth = config.width, config.depth
        self.vocab_size, self.num_classes = config.vocab_size, config.num_classes
        if config.caption_width is None:
            self.cls_embedding: nn.Module = LabelEmbedding(config.num_classes, config.width)
        else:
            self.cls_embedding = CaptionEmbedding(config.caption_width, config.caption_length, config.width)
        self.tok_embeddings: nn.Module = (
            nn.Embedding(config.vocab_size, config.width)
            if config.code_width is None
            else Linear(config.code_width, config.width)
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.output = Linear(config.width, config.vocab_size, bias=False)
        factors = rotary_factors(round(config.tokens**0.5), config.width // config.heads, config.prefix)
        self.register_buffer("factors", factors, persistent=False)

    def initialize(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Draw fresh weights as LlamaGen does: normal of `std`, output head zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.output.weight)

    def condition(self, labels: Tensor | tuple[Tensor, Tensor]) -> Condition:
        """Labels int64 [B], or `(features [B,P,E], mask [B,P])` for a caption model.

        Raises:
            ValueError: it is not what this model is conditioned on.
        """
        if self.config.caption_width is None:
            if not isinstance(labels, Tensor):
                raise ValueError("this model takes class labels, not captions")
            prefix_BPD = self.cls_embedding(labels)
            return Condition(prefix_BPD=prefix_BPD, class_BD=prefix_BPD[:, 0])
        length, width = self.config.caption_length, self.config.caption_width
        if isinstance(labels, Tensor):
            raise ValueError(f"this model takes captions: features [B, {length}, {width}] and a mask [B, {length}]")
        features_BPE, mask_BP = labels
        if features_BPE.shape[1:] != (length, width) or mask_BP.shape != features_BPE.shape[:2]:
            raise ValueError(
                f"captions must be features [B, {length}, {width}] and a mask [B, {length}], got "
                f"{tuple(features_BPE.shape)} and {tuple(mask_BP.shape)}"
            )
        mask = mask_BP.bool()
        return Condition(prefix_BPD=self.cls_embedding(features_BPE), mask_BP=None if bool(mask.all()) else mask)

    def unconditional(self, labels: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """The label after the last class, or the learned empty caption under the same mask."""
        if isinstance(labels, Tensor):
            return torch.full_like(labels, self.num_classes)
        assert isinstance(self.cls_embedding, CaptionEmbedding)
        features_BPE, mask_BP = labels
        return self.cls_embedding.uncond_embedding.expand_as(features_BPE), mask_BP

    def null_labels(self, batch: int) -> Tensor | tuple[Tensor, Tensor]:
        device = self.output.weight.device
        if self.config.caption_width is None:
            return torch.full((batch,), self.num_classes, device=device)
        assert isinstance(self.cls_embedding, CaptionEmbedding)
        features_BPE = self.cls_embedding.uncond_embedding.expand(batch, -1, -1)
        return features_BPE, torch.ones(batch, self.config.caption_length, device=device)

    def guidance_weight(self, scale: float, step: int) -> float:
        """Upstream: `uncond + scale (cond - uncond)`; a scale of at most 1 is off."""
        return max(scale - 1.0, 0.0)

    def token_inputs(self, ids_BN: Tensor, seen: int = 0) -> Tensor:
        return self.tok_embeddings(ids_BN[:, seen:])

    def mixed_inputs(self, ids_BN: Tensor, resolved_BN: Tensor, noise_BNC: Tensor) -> tuple[Tensor, Tensor]:
        resolved_BN1 = resolved_BN[..., None]
        return self.tok_embeddings(ids_BN).masked_fill(~resolved_BN1, 0), noise_BNC.masked_fill(resolved_BN1, 0)

    def vector_inputs(self, sequence_BLC: Tensor) -> Tensor:
        return self.tok_embeddings(sequence_BLC)

    def student_state(self, teacher: "LlamaGenTransformer", codebook_VC: Tensor) -> dict[str, Tensor]:
        """The teacher's weights, of fewer layers the evenly spaced ones; the input map is the least-squares fit of
        the teacher's token table on the codes."""
        state = renumber_layers(teacher.state_dict(), "layers", teacher.depth, self.depth)
        if self.config.code_width is None:
            return state
        return state | fit_input_map(codebook_VC, state["tok_embeddings.weight"])

    def new_cache(self, batch: int) -> KeyValueCache:
        config, weight = self.config, self.output.weight
        shape = (batch, config.heads, config.prefix + config.tokens, config.width // config.heads)
        dtype = torch.float32 if weight.device.type == "cpu" else compute_dtype(weight)  # see `attend_one`
        return KeyValueCache(config.depth, shape, device=weight.device, dtype=dtype)

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
        mask = self.attention_mask(seen, stop, condition.mask_BP, inputs_BND.device)
        h = inputs_BND
        for i in range(self.depth) if blocks is None else blocks:
            layer = self.layers[i]
            h = layer(h, self.factors[seen:stop], mask, i, cache, None if residuals is None else residuals[i])
        if cache is not None:
            cache.length = stop
        return h

    def attention_mask(self, seen: int, stop: int, mask_BP: Tensor | None, device: torch.device) -> Tensor | None:
        """bool [1 or B, 1, stop-seen, stop], True where a query may look; None where a flag serves.

        Padding is hidden from everyone but itself, so that no row is empty.
        """
        if mask_BP is None and (seen == 0 or stop - seen == 1):
            return None
        positions = torch.arange(stop, device=device)
        allowed = positions[None, seen:, None] >= positions[None, None, :]
        if mask_BP is not None:
            prefix = min(mask_BP.shape[1], stop)
            real_BS = F.pad(mask_BP[:, :prefix], (0, stop - prefix), value=True)
            itself = positions[None, seen:, None] == positions[None, None, :]
            allowed = (allowed & real_BS[:, None, :]) | itself
        return allowed[:, None]

    def head_parameters(self) -> list[nn.Parameter]:
        """What `logits` reads."""
        return [*self.norm.parameters(), *self.output.parameters()]

    def logits(self, hidden_BND: Tensor, condition: Condition) -> Tensor:
        return self.output(self.norm(hidden_BND)).float()
