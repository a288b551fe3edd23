"""LlamaGen's VQ tokenizer (arXiv 2406.06525; the convolutional VQGAN of arXiv 2012.09841).

Attribute names follow upstream's state dict, so a published file loads by name; sizes are arguments, so the same
classes serve the published f16 model and a 64-token one.

B batch, C code width, V codes, L tokens, h w the latent grid, H W the image.
"""

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Sizes of a `VQModel`; the defaults are the published VQ-16."""

    vocab_size: int = 16384
    code_width: int = 8
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256

    def __post_init__(self) -> None:
        check_sizes(self)

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
        self._known: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    @property
    def unit_VC(self) -> Tensor:
        """Unit rows. In evaluation mode and without gradients they are made anew only after the table has changed."""
        table_VC = self.embedding.weight
        if self.training or table_VC.is_inference() or (torch.is_grad_enabled() and table_VC.requires_grad):
            return F.normalize(table_VC, dim=-1)
        key = (table_VC.device, table_VC.dtype, table_VC.data_ptr(), table_VC._version)
        if self._known is None or self._known[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                # the table stays, so that its memory is given to no other
                self._known = (key, F.normalize(table_VC, dim=-1), table_VC.detach())
        return self._known[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin anew: the versions of their tables do."""
        return {**self.__dict__, "_known": None}


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
        check_images(images_B3HW, self.config.downsampling)
        latents_BLC = rearrange(self.latents(images_B3HW), "b c h w -> b (h w) c")
        return nearest_code(latents_BLC, self.codebook_VC)

    def decode(self, tokens: Tensor) -> Tensor:
        """Ids int64 [B,L] or embeddings [B,L,C] to images fp32 [B,3,H,W], nominally in [-1,1], not clamped."""
        embeddings_BLC = code_vectors(tokens, self.codebook_VC)
        side = round(embeddings_BLC.shape[1] ** 0.5)
        if not side or side * side != embeddings_BLC.shape[1]:
            raise ValueError(f"{embeddings_BLC.shape[1]} tokens do not form a square grid")
        latents = rearrange(embeddings_BLC, "b (h w) c -> b c h w", h=side)
        return self.decoder(self.post_quant_conv(latents)).float()

    def reconstruct(self, images_B3HW: Tensor, generator: torch.Generator) -> Reconstruction:
        """Encode, quantise and decode, straight through; `generator` is for tokenizers that draw."""
        latents_BLC = rearrange(self.latents(images_B3HW), "b c h w -> b (h w) c")
        with torch.no_grad():
            ids_BL = nearest_code(latents_BLC, self.codebook_VC)
        codes_BLC = F.embedding(ids_BL, self.codebook_VC)
        straight_through = latents_BLC + (codes_BLC - latents_BLC).detach()
        commitment = F.mse_loss(latents_BLC, codes_BLC.detach())
        return Reconstruction(
            images_B3HW=self.decode(straight_through),
            ids=ids_BL,
            targets_NC=latents_BLC.detach().flatten(0, 1),
            code_loss=F.mse_loss(codes_BLC, latents_BLC.detach()) + COMMITMENT * commitment,
        )
