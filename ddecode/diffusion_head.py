"""The light head that turns a position's features into the velocity of its noisy code (DD2, arXiv 2510.21003).

B batch, N positions, C code width, D feature width, W the head's own width. `time` is the noise level: 1 is pure
noise, 0 the code.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 64
FASTEST = 256.0
"""Radians by which the fastest wave of the time embedding turns over the whole range of noise levels."""


class ModulatedBlock(nn.Module):
    """Residual MLP whose layer norm is shifted, scaled and gated by the condition; it starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h_BNW: Tensor, condition_BNW: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition_BNW).chunk(3, -1)
        return h_BNW + gate * self.mlp(F.layer_norm(h_BNW, h_BNW.shape[-1:]) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """Velocity v = eps - q of noisy codes x = (1-t) q + t eps, each position for itself.

    For codes of mean m and standard deviation sigma, in each of the C directions, the best linear guess of v and the
    standard deviation of what it leaves open are known, so the network F only adds what it knows better:

        y = x - (1-t) m        n^2 = (1-t)^2 sigma^2 + t^2
        v = -m + (t - (1-t) sigma^2) y / n^2 + sigma / n F(y / n, t, features)

    (the preconditioning of EDM, arXiv 2206.00364, section 5, written for this path). F starts at zero: then the
    posterior mean x - t v is m at t = 1, where x says nothing, and x at t = 0.

    Args:
        features: D.
        code_width: C.
        width: W; None is D.
        depth: number of blocks.
    """

    mean_C: Tensor
    deviation_C: Tensor

    def __init__(self, features: int, code_width: int, width: int | None = None, depth: int = 3) -> None:
        super().__init__()
        width = width or features
        self.code = nn.Linear(code_width, width)
        self.features = nn.Linear(features, width)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, code_width)
        for linear in (self.modulation, self.output):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.register_buffer("mean_C", torch.zeros(code_width))
        self.register_buffer("deviation_C", torch.ones(code_width))

    @torch.no_grad()
    def calibrate(self, codebook_VC: Tensor) -> None:
        """Take m and sigma from a codebook; without it they are 0 and 1."""
        self.mean_C.copy_(codebook_VC.float().mean(0))
        self.deviation_C.copy_(codebook_VC.float().std(0, correction=0).clamp(min=1e-6))

    def scale(self, time: Tensor) -> Tensor:
        """Standard deviation n of noisy codes at a noise level, in each direction."""
        return torch.hypot((1 - time) * self.deviation_C, time)

    def forward(self, features_BND: Tensor, x_BNC: Tensor, time_BN: Tensor) -> Tensor:
        """One velocity for each noisy code.

        Args:
            features_BND: what is known about each position; normalised here.
            x_BNC: noisy codes; may have more leading dimensions, which share the features.
            time_BN: noise level in (0, 1], of x's leading shape.

        Returns:
            fp32, of x's shape.
        """
        x_BNC, t_BN1 = x_BNC.float(), time_BN.float()[..., None]
        norm_BNC = self.scale(t_BN1)
        y_BNC = (x_BNC - (1 - t_BN1) * self.mean_C) / norm_BNC
        guess_BNC = (t_BN1 - (1 - t_BN1) * self.deviation_C.square()) / norm_BNC * y_BNC - self.mean_C
        known_BNW = self.features(F.layer_norm(features_BND, features_BND.shape[-1:], eps=1e-6))
        condition_BNW = F.silu(known_BNW + self.time(waves(time_BN)))
        h_BNW = self.code(y_BNC)
        for block in self.blocks:
            h_BNW = block(h_BNW, condition_BNW)
        shift, scale = self.modulation(condition_BNW).chunk(2, -1)
        h_BNW = F.layer_norm(h_BNW, h_BNW.shape[-1:]) * (1 + scale) + shift
        return guess_BNC + self.deviation_C / norm_BNC * self.output(h_BNW).float()


def waves(time_BN: Tensor) -> Tensor:
    """Cosines and sines of the noise level, [..., 2 FREQUENCIES], from 1 to FASTEST radians over [0, 1]."""
    exponents = torch.linspace(0, math.log(FASTEST), FREQUENCIES, device=time_BN.device)
    angles = time_BN.float()[..., None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], -1)
