"""The convolutional encoder and decoder that LlamaGen's and VAR's tokenizers share (VQGAN, arXiv 2012.09841).

Attribute names are those of LlamaGen's state dict; VAR's are mapped onto them in `third_party_loaders.var`.

Both run channels last, which convolutions and norms are faster in, most of all in half precision. The activations say
so and every layer follows; the weights keep torch's usual layout, whatever state was assigned to them.

B batch, C latent channels, h w the latent grid, H W the image.
"""

from itertools import pairwise
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from third_party_loaders.attention import attend


class VQGANConfig(Protocol):
    """The sizes that encoder and decoder read."""

    @property
    def channels(self) -> int: ...
    @property
    def channel_mult(self) -> tuple[int, ...]: ...
    @property
    def res_blocks(self) -> int: ...
    @property
    def z_channels(self) -> int: ...


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    """In place: at the widest levels, asking the system for as much memory again takes longer than the function."""
    return F.silu(x, inplace=True)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return h.add_(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the latent grid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(conv(normed), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        mixed = attend(q, k, v)
        mixed = rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(mixed)


class Resample(nn.Module):
    """Halve (`downsample`) or double (`upsample`) height and width; upstream keeps one conv in either."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention at the coarsest, then an optional resampling."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, *, attention: bool, resample: str | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.res = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))
        self.resample_name = resample
        if resample is not None:
            self.add_module(resample, Resample(out_channels, down=resample == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self.resample_name is None else self.get_submodule(self.resample_name)(x)


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)])


class Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(before, width, config.res_blocks, attention=i == last, resample=None if i == last else "downsample")
            for i, (before, width) in enumerate(pairwise([config.channels, *widths]))
        )
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(swish(self.norm_out(x)))


class Decoder(nn.Module):
    """Computes in the dtype of its weights, whatever that of its input."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(before, width, config.res_blocks + 1, attention=i == 0, resample=None if i == last else "upsample")
            for i, (before, width) in enumerate(pairwise([widths[0], *widths]))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z.to(self.conv_in.weight.dtype, memory_format=torch.channels_last))
        for block in (*self.mid, *self.conv_blocks):
            z = block(z)
        return self.conv_out(swish(self.norm_out(z)))
