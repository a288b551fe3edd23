"""The convolutional encoder and decoder: channels last, in place, in the dtype of their weights.

B batch, C latent channels, h w the latent grid, H W the image.
"""

import pytest
import torch
from einops import rearrange
from tiny import make_tokenizer, make_var_tokenizer, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from third_party_loaders.vqgan import AttnBlock, Decoder, ResnetBlock


def plain_block(block: nn.Module, x: Tensor) -> Tensor:
    if isinstance(block, ResnetBlock):
        h = block.conv1(F.silu(block.norm1(x)))
        h = block.conv2(F.silu(block.norm2(h)))
        return (block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x) + h
    assert isinstance(block, AttnBlock)
    normed = block.norm(x)
    q, k, v = (rearrange(conv(normed), "b c h w -> b (h w) c") for conv in (block.q, block.k, block.v))
    mixed = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
    return x + block.proj_out(rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2]))


def plain_decoder(decoder: Decoder, z: Tensor) -> Tensor:
    """The same written out, in torch's usual layout and without changing anything in place."""
    z = decoder.conv_in(z.contiguous())
    for block in decoder.mid:
        z = plain_block(block, z)
    for level in decoder.conv_blocks:
        for i, block in enumerate(level.res):
            z = plain_block(block, z)
            if len(level.attn):
                z = plain_block(level.attn[i], z)
        if level.resample_name is not None:
            z = level.upsample.conv(F.interpolate(z, scale_factor=2.0, mode="nearest"))
    return decoder.conv_out(F.silu(decoder.norm_out(z)))


@pytest.fixture(params=["llamagen", "var"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    tokenizer = make_tokenizer() if request.param == "llamagen" else make_var_tokenizer()
    return tokenizer.decoder


def latents(decoder: Decoder) -> Tensor:
    return torch.randn(2, decoder.conv_in.in_channels, 3, 3, generator=seeded(0))


def test_the_decoder_equals_the_plain_one_and_leaves_its_input_alone(decoder: Decoder) -> None:
    z_BChw = latents(decoder)
    kept = z_BChw.clone()
    images = decoder(z_BChw)
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images, plain_decoder(decoder, z_BChw), rtol=0, atol=1e-5)
    assert torch.equal(z_BChw, kept)


def test_gradients_equal_the_plain_ones(decoder: Decoder) -> None:
    decoder.requires_grad_(True)
    found = []
    for decode in (decoder, lambda z: plain_decoder(decoder, z)):
        z_BChw = latents(decoder).requires_grad_()
        found.append(torch.autograd.grad(decode(z_BChw).square().sum(), [z_BChw, *decoder.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_decoder_computes_in_the_dtype_of_its_weights(decoder: Decoder) -> None:
    exact = decoder(latents(decoder))
    half = decoder.to(torch.bfloat16)(latents(decoder))
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_the_layout_of_weights_is_torchs_own(decoder: Decoder) -> None:
    decoder(latents(decoder))
    assert all(weight.is_contiguous() for weight in decoder.state_dict().values())
