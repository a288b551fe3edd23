"""LlamaGen's VQ tokenizer (arXiv 2406.06525; the convolutional VQGAN of arXiv 2012.09841).

Attribute names follow upstream's state dict, so a published file loads by name; sizes are arguments, so the same
classes serve the published f16 model and a 64-token one.

B batch, C code width, V codes, L tokens, h w the latent grid, H W the image.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from third_party_loaders.vqgan import Decoder, Encoder


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Sizes of a `VQModel`; the defaults are the published VQ-16."""

    vocab_size: int = 16384
    code_width: int = 8
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)


class Codes(nn.Module):
    """The L2-normalised codebook; `codebook_used` is upstream's usage record, kept so that files round-trip."""

    codebook_used: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.code_width)
        self.register_buffer("codebook_used", VQModel.unused_record())

    @property
    def unit_VC(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)


class VQModel(nn.Module):
    """Images to tokens and back. It is LlamaGen's `Tokenizer` (see `ddecode.types.Tokenizer`)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codes(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.z_channels, 1)

    @staticmethod
    def unused_record() -> Tensor:
        """The `codebook_used` buffer of a model that saw no data."""
        return torch.zeros(65536)

    @property
    def codebook_VC(self) -> Tensor:
        """Unit rows, fp32."""
        return self.quantize.unit_VC

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """The encoder's unit vectors before quantisation, [B, C, h, w]."""
        return F.normalize(self.quant_conv(self.encoder(images_B3HW)).float(), dim=1)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images fp32 [B,3,H,W] in [-1,1] to ids int64 [B,L] in raster order."""
        latents_BLC = rearrange(self.latents(images_B3HW), "b c h w -> b (h w) c")
        return nearest_code(latents_BLC, self.codebook_VC)

    def decode(self, tokens: Tensor) -> Tensor:
        """Ids int64 [B,L] or embeddings [B,L,C] to images fp32 [B,3,H,W], nominally in [-1,1], not clamped."""
        embeddings_BLC = tokens if tokens.is_floating_point() else F.embedding(tokens, self.codebook_VC)
        side = round(embeddings_BLC.shape[1] ** 0.5)
        if side * side != embeddings_BLC.shape[1]:
            raise ValueError(f"{embeddings_BLC.shape[1]} tokens do not form a square grid")
        latents = rearrange(embeddings_BLC, "b (h w) c -> b c h w", h=side)
        return self.decoder(self.post_quant_conv(latents)).float()
