"""VAR's tokenizer: scales that add up, the inputs of a transformer, sizes.

B batch, L tokens, N tokens of one scale, V codes, C code width, h w the latent grid.
"""

import pytest
import torch
from tiny import make_var_teacher, make_var_tokenizer, seeded
from torch import nn
from torch.nn import functional as F

from third_party_loaders.var_tokenizer import MultiScaleVQ, MultiScaleVQConfig, conv_of_scale
from third_party_loaders.var_transformer import VARConfig

L, C, V = 14, 8, 32


def make_plain(**sizes: object) -> MultiScaleVQ:
    """A tokenizer whose residual convolutions change nothing."""
    tokenizer = make_var_tokenizer(**sizes)
    for conv in tokenizer.quantize.quant_resi.qresi_ls:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    return tokenizer


@torch.no_grad()
def test_tokens_and_their_codes_decode_alike_and_images_are_clamped() -> None:
    tokenizer = make_var_tokenizer()
    tokenizer.decoder.conv_out.weight *= 20
    ids_BL = torch.randint(V, (2, L), generator=seeded(0))
    codes_BLC = F.embedding(ids_BL, tokenizer.codebook_VC)
    images = tokenizer.decode(ids_BL)
    assert images.shape == (2, 3, 6, 6) and images.dtype == torch.float32
    assert torch.equal(tokenizer.decode(codes_BLC), images)
    parts = [tokenizer.contribution(part, scale) for scale, part in enumerate(codes_BLC.split((1, 4, 9), 1))]
    unclamped = tokenizer.decode_latents(sum(parts))
    assert unclamped.abs().max() > 1
    torch.testing.assert_close(images, unclamped.clamp(-1, 1), rtol=0, atol=1e-4)


def test_a_scale_is_brought_to_full_size_and_half_convolved() -> None:
    tokenizer = make_var_tokenizer()
    conv = tokenizer.quantize.quant_resi.qresi_ls[conv_of_scale(2, 3, 4)]
    codes_BNC = torch.randn(2, 9, C, generator=seeded(0))
    map_BChw = codes_BNC.transpose(1, 2).reshape(2, C, 3, 3)
    expected = (map_BChw + F.conv2d(map_BChw, conv.weight, conv.bias, padding=1)) / 2
    torch.testing.assert_close(tokenizer.contribution(codes_BNC, 2), expected)
    spread = codes_BNC[:, 0, :, None, None].expand(-1, -1, 3, 3)
    torch.testing.assert_close(make_plain().contribution(codes_BNC[:, :1], 0), spread)
    conv = tokenizer.quantize.quant_resi.qresi_ls[0]
    torch.testing.assert_close(tokenizer.contribution(codes_BNC[:, :1], 0), conv(spread))


@torch.no_grad()
def test_a_coarse_scale_is_brought_to_full_size_bicubically() -> None:
    edge_BNC = torch.tensor([0.0, 1.0, 0.0, 1.0])[None, :, None].expand(1, 4, C)
    row = torch.tensor([-0.10546875, 0.2265625, 0.7734375, 1.10546875])  # by hand, Keys' kernel with a = -3/4
    torch.testing.assert_close(make_plain(patch_nums=(2, 4)).contribution(edge_BNC, 0), row.expand(1, C, 4, 4))


@torch.no_grad()
def test_each_scale_explains_more_of_the_latents() -> None:
    tokenizer = make_plain(patch_nums=(1, 2, 4, 8), vocab_size=512, code_width=4)
    latents_BChw = F.interpolate(torch.randn(3, 4, 5, 5, generator=seeded(0)), size=(8, 8), mode="bicubic")
    steps = list(tokenizer.quantise(latents_BChw))
    errors = [(latents_BChw - step.latents_BChw).square().mean().item() for step in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * latents_BChw.square().mean()
    rest_BChw = latents_BChw
    for step, side in zip(steps, (1, 2, 4, 8), strict=True):
        target_BNC = F.adaptive_avg_pool2d(rest_BChw, side).flatten(2).transpose(1, 2)
        torch.testing.assert_close(step.target_BNC, target_BNC)
        nearest = torch.cdist(target_BNC, tokenizer.codebook_VC.expand(3, -1, -1)).argmin(-1)
        assert torch.equal(step.ids_BN, nearest)
        rest_BChw = latents_BChw - step.latents_BChw


@torch.no_grad()
def test_encoding_is_quantising_the_encoders_latents() -> None:
    tokenizer = make_var_tokenizer()
    images = torch.rand(2, 3, 6, 6, generator=seeded(0)) * 2 - 1
    ids_BL = tokenizer.encode(images)
    assert ids_BL.shape == (2, L) and ids_BL.dtype == torch.int64
    *_, last = tokenizer.quantise(tokenizer.latents(images))
    parts = F.embedding(ids_BL, tokenizer.codebook_VC).split((1, 4, 9), 1)
    total = sum(tokenizer.contribution(part, scale) for scale, part in enumerate(parts))
    torch.testing.assert_close(last.latents_BChw, total)


def test_inputs_of_a_prefix_are_the_prefix_of_the_inputs() -> None:
    tokenizer = make_var_tokenizer(patch_nums=(1, 2, 3, 4))
    codes_BNC = torch.randn(2, 14, C, generator=seeded(0))
    whole = tokenizer.next_inputs(codes_BNC)
    assert whole.shape == (2, 4 + 9 + 16, C)
    for stop, known in ((1, 4), (5, 13)):
        assert torch.equal(tokenizer.next_inputs(codes_BNC[:, :stop]), whole[:, :known])
    first = F.interpolate(tokenizer.contribution(codes_BNC[:, :1], 0), size=(2, 2), mode="area")
    torch.testing.assert_close(whole[:, :4], first.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("convs", "expected"),
    [
        # four ticks stand at 1/12, 13/36, 23/36 and 11/12; two places of ten and the middle of five lie between two
        (4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (4, [0, 0, 1, 2, 3, 3]),
        (4, [0, 1, 2, 2, 3]),
        (4, [0, 2, 3]),
        (1, [0, 0, 0]),
        (3, [0, 0, 1, 2, 2]),  # ticks at 1/6, 1/2 and 5/6
        (4, [0]),
    ],
    ids=str,
)
def test_a_scale_uses_the_convolution_nearest_to_its_place(convs: int, expected: list[int]) -> None:
    assert [conv_of_scale(scale, len(expected), convs) for scale in range(len(expected))] == expected


def test_wrong_sizes_are_refused() -> None:
    tokenizer = make_var_tokenizer()
    with pytest.raises(ValueError, match=r"images must be 6 x 6 for these scales, got \(8, 8\)"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="expected 14 tokens, got 13"):
        tokenizer.decode(torch.zeros(1, 13, C))
    with pytest.raises(ValueError, match=r"3 tokens do not end on a scale of \[1, 2, 3\]"):
        tokenizer.next_inputs(torch.zeros(1, 3, C))
    with pytest.raises(ValueError, match="positive and ascending"):
        MultiScaleVQConfig(patch_nums=(1, 3, 2))
    with pytest.raises(ValueError, match="16 does not divide over 3 heads"):
        make_var_teacher(heads=3)
    with pytest.raises(ValueError, match="must be positive"):
        VARConfig(vocab_size=V, code_width=C, width=16, depth=1, heads=1, patch_nums=())
