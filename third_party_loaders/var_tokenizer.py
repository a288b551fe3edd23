"""VAR's multi-scale residual VQ tokenizer (arXiv 2404.02905, algorithms 1 and 2).

An image's latent map is approximated scale by scale: what the coarser scales left is averaged down to the next grid,
quantised there, brought back to full size and passed through a residual convolution.

B batch, L tokens (scales concatenated, raster order inside), N tokens of one scale, V codes, C code width, h w the
latent grid, H W the image.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.arguments import check_images, check_sizes
from ddecode.codebook import code_vectors, nearest_code
from ddecode.types import Reconstruction
from third_party_loaders.vqgan import Decoder, Encoder

COMMITMENT = 0.25
"""Weight of the latents' part in the code loss, upstream's."""
COARSE_SHARE = 0.4
"""Share of the samples that are decoded from their first scales alone: it moves an image's structure into them, so that
the tokens of the last scale are all but independent given those before, as next-scale prediction assumes."""


@dataclass(frozen=True, kw_only=True)
class MultiScaleVQConfig:
    """Sizes of a `MultiScaleVQ`; the defaults are the published `vae_ch160v4096z32` at 256 pixels."""

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side of the token grid at each scale; the last is the latent grid itself."""
    vocab_size: int = 4096
    code_width: int = 32
    channels: int = 160
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    shared_convs: int = 4
    """Residual convolutions, each shared by neighbouring scales."""
    recorded_scales: int = 10
    """Rows of upstream's usage record; a file may have been trained on other scales than it is used with."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if not self.patch_nums or min(self.patch_nums) < 1 or list(self.patch_nums) != sorted(self.patch_nums):
            raise ValueError(f"patch_nums must be positive and ascending, got {list(self.patch_nums)}")

    @property
    def z_channels(self) -> int:
        return self.code_width


@dataclass(frozen=True, kw_only=True)
class ScaleStep:
    """One scale of `MultiScaleVQ.quantise`."""

    target_BNC: Tensor
    """What was left to explain, averaged down to this scale's grid."""
    ids_BN: Tensor
    latents_BChw: Tensor
    """The sum of all scales so far."""


class ResidualConv(nn.Conv2d):
    """Half identity, half 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * super().forward(x)


class ResidualConvs(nn.Module):
    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(ResidualConv(channels) for _ in range(count))


class ResidualCodes(nn.Module):
    """Codebook and residual convolutions; `ema_vocab_hit_SV` is upstream's usage record, kept for round trips."""

    ema_vocab_hit_SV: Tensor

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.code_width)
        self.quant_resi = ResidualConvs(config.shared_convs, config.code_width)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(config.recorded_scales, config.vocab_size))


def conv_of_scale(scale: int, scales: int, convs: int) -> int:
    """Which shared convolution a scale uses: the one whose tick on [0, 1] is nearest to the scale's place.

    In numpy's double precision and with its rule for ties, as upstream decides it.
    """
    margin = 1 / 3 / convs if convs == 4 else 1 / 2 / convs
    ticks = np.linspace(margin, 1 - margin, convs)
    return int(np.argmin(np.abs(ticks - scale / max(1, scales - 1))))


class MultiScaleVQ(nn.Module):
    """Images to tokens and back. It is VAR's `Tokenizer` (see `ddecode.types.Tokenizer`)."""

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = ResidualCodes(config)
        scales = len(config.patch_nums)
        self.conv_at = tuple(conv_of_scale(scale, scales, config.shared_convs) for scale in range(scales))
        self.quant_conv = nn.Conv2d(config.code_width, config.code_width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.code_width, 3, padding=1)

    @property
    def codebook_VC(self) -> Tensor:
        """The codes as they are stored, fp32."""
        return self.quantize.embedding.weight

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each scale; they sum to L."""
        return tuple(side * side for side in self.config.patch_nums)

    def contribution(self, codes_BNC: Tensor, scale: int) -> Tensor:
        """What one scale's code vectors add to the latents, [B,C,h,w]: brought to full size, then convolved."""
        patch_nums, full = self.config.patch_nums, self.config.patch_nums[-1]
        map_BChw = rearrange(codes_BNC, "b (h w) c -> b c h w", h=patch_nums[scale])
        if scale + 1 < len(patch_nums):
            map_BChw = F.interpolate(map_BChw, size=(full, full), mode="bicubic")
        return self.quantize.quant_resi.qresi_ls[self.conv_at[scale]](map_BChw)

    def pool(self, latents_BChw: Tensor, scale: int) -> Tensor:
        """Latents averaged down to a scale's grid, [B,N,C]."""
        side = self.config.patch_nums[scale]
        return rearrange(F.interpolate(latents_BChw, size=(side, side), mode="area"), "b c h w -> b (h w) c")

    def next_inputs(self, codes_BNC: Tensor) -> Tensor:
        """What a transformer reads at the scales after the first, given the codes of all scales before each.

        Args:
            codes_BNC: code vectors of the first whole scales.

        Returns:
            [B,M,C]: the latents so far, averaged down to the grids of scale 1 up to the one after those given.
        """
        total: Tensor | None = None
        inputs = []
        for scale, codes in enumerate(codes_BNC.split(self.scales_of(codes_BNC.shape[1]), 1)):
            part = self.contribution(codes, scale)
            total = part if total is None else total + part
            inputs.append(self.pool(total, scale + 1))
        return torch.cat(inputs, 1)

    def added_inputs(self, codes_BNC: Tensor, scale: int) -> Tensor:
        """What one scale's code vectors add to what a transformer reads at each later scale, [B,M,C]."""
        part = self.contribution(codes_BNC, scale)
        return torch.cat([self.pool(part, later) for later in range(scale + 1, len(self.config.patch_nums))], 1)

    def scales_of(self, tokens: int) -> list[int]:
        """Token counts of the first scales, which must sum to `tokens`."""
        counts: list[int] = []
        for count in self.counts:
            if sum(counts) == tokens:
                break
            counts.append(count)
        if sum(counts) != tokens:
            raise ValueError(f"{tokens} tokens do not end on a scale of {list(self.config.patch_nums)}")
        return counts

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """The encoder's output before quantisation, [B,C,h,w]."""
        return self.quant_conv(self.encoder(images_B3HW)).float()

    def quantise(self, latents_BChw: Tensor) -> Iterator[ScaleStep]:
        """Explain the latents scale by scale. Gradients reach codebook and convolutions, not the latents."""
        rest_BChw = latents_BChw.detach()
        total = torch.zeros_like(rest_BChw)
        for scale in range(len(self.config.patch_nums)):
            target_BNC = self.pool(rest_BChw, scale)
            ids_BN = nearest_code(target_BNC, self.codebook_VC)
            part = self.contribution(self.quantize.embedding(ids_BN), scale)
            total = total + part
            rest_BChw = rest_BChw - part.detach()
            yield ScaleStep(target_BNC=target_BNC, ids_BN=ids_BN, latents_BChw=total)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images fp32 [B,3,H,W] in [-1,1] to ids int64 [B,L]."""
        check_images(images_B3HW, 2 ** (len(self.config.channel_mult) - 1))
        latents_BChw = self.latents(images_B3HW)
        full = self.config.patch_nums[-1]
        if latents_BChw.shape[-2:] != (full, full):
            side = full * 2 ** (len(self.config.channel_mult) - 1)
            raise ValueError(f"images must be {side} x {side} for these scales, got {tuple(images_B3HW.shape[-2:])}")
        return torch.cat([step.ids_BN for step in self.quantise(latents_BChw)], 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Ids int64 [B,L] or embeddings [B,L,C] to images fp32 [B,3,H,W], clamped to [-1,1]."""
        codes_BLC = code_vectors(tokens, self.codebook_VC)
        if codes_BLC.shape[1] != sum(self.counts):
            raise ValueError(f"expected {sum(self.counts)} tokens, got {codes_BLC.shape[1]}")
        parts = [self.contribution(codes, scale) for scale, codes in enumerate(codes_BLC.split(self.counts, 1))]
        return self.decode_latents(torch.stack(parts).sum(0)).clamp(-1, 1)

    def decode_latents(self, latents_BChw: Tensor) -> Tensor:
        """Quantised latents to images fp32, not clamped."""
        return self.decoder(self.post_quant_conv(latents_BChw)).float()

    def reconstruct(self, images_B3HW: Tensor, generator: torch.Generator) -> Reconstruction:
        """Encode, quantise and decode, straight through.

        The code loss is the mean over scales of how far the sum so far is from the latents (arXiv 2404.02905). A random
        `COARSE_SHARE` of the images is decoded from a random number of first scales.
        """
        latents_BChw = self.latents(images_B3HW)
        steps = list(self.quantise(latents_BChw))
        losses = [
            F.mse_loss(step.latents_BChw, latents_BChw.detach())
            + COMMITMENT * F.mse_loss(step.latents_BChw.detach(), latents_BChw)
            for step in steps
        ]
        batch, last = len(latents_BChw), len(steps) - 1
        coarse_B = torch.rand(batch, generator=generator) < COARSE_SHARE
        last_B = torch.where(coarse_B, torch.randint(max(1, last), (batch,), generator=generator), last)
        quantised_BChw = torch.stack([step.latents_BChw for step in steps])[last_B, torch.arange(batch)]
        straight_through = latents_BChw + (quantised_BChw - latents_BChw).detach()
        all_BNC = [step.target_BNC for step in steps]
        # as many of each scale, whatever its size
        some = [t_BNC[:, torch.randint(t_BNC.shape[1], (4,), generator=generator)] for t_BNC in all_BNC]
        return Reconstruction(
            images_B3HW=self.decode_latents(straight_through),
            ids=torch.cat([step.ids_BN for step in steps], 1),
            targets_NC=torch.cat(some, 1).flatten(0, 1),
            code_loss=torch.stack(losses).mean(),
        )
