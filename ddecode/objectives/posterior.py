"""Posterior means of noisy codes, and what follows from them.

At every position a code q is noised to x = (1-t) q + t eps, t being the noise level. What there is to know about q is
its posterior mean D = E[q | x, earlier tokens]; score and velocity follow from it and, unlike it, are 0/0 in their
usual form where a one-step generator stands, at t = 1.

B batch, R noise draws that share one pass of a backbone, L token positions, V codes, C code width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddecode.flow import augmented, centred
from ddecode.randomness import draw

ROWS_TIMES_CODES = 1 << 22
"""Largest number of weights computed at once, unless a single row has more."""
LEAST_TIME = 0.02
"""Smallest noise level that is drawn: below it D is the nearest code for teacher and generator alike."""


def posterior_mean(x_BLC: Tensor, time_BL: Tensor, log_probs_BLV: Tensor, codebook_VC: Tensor) -> Tensor:
    """The exact mean of the codes that may lie under noisy ones (DD2, section 4.1, less its singular factors).

        D = sum_j softmax_j( log p_j + s z.c_j - s^2 |c_j|^2 / 2 ) c_j,    s = (1-t)/t,    z = x/t

    At t = 1 it is the mean under p. Moving the codebook by m moves z by s m, so the centred codes serve.

    Args:
        x_BLC: noisy codes (1-t) q + t eps; may have more leading dimensions, which share the log-probabilities.
        time_BL: noise level in (0, 1], of x's leading shape.
        log_probs_BLV: may hold -inf, at least one per row finite; need not be normalised.
        codebook_VC: float.

    Returns:
        D fp32, of x's shape, with gradients to x (which hold a softmax over V for every row).
    """
    C, V = codebook_VC.shape[1], len(codebook_VC)
    with torch.autocast(x_BLC.device.type, enabled=False):
        codes_VC = centred(codebook_VC)
        mean_C = codebook_VC.float().mean(0)
        terms = augmented(codes_VC)
        t = time_BL.float()[..., None]
        s = (1 - t) / t
        points = torch.cat([s * (x_BLC.float() / t - s * mean_C), s.square()], -1)
        log_p_NV = log_probs_BLV.float().reshape(-1, V)
        rows = max(1, ROWS_TIMES_CODES // V)
        parts = [
            torch.addmm(log_p, point, terms).softmax(-1) @ codes_VC
            for draw in points.reshape(-1, len(log_p_NV), C + 1)
            for log_p, point in zip(log_p_NV.split(rows), draw.split(rows), strict=True)
        ]
        return torch.cat(parts).reshape(x_BLC.shape) + mean_C


def score(x_BLC: Tensor, mean_BLC: Tensor, time_BL: Tensor) -> Tensor:
    """Gradient of the log-density at a noisy code, from the posterior mean: ((1-t) D - x) / t^2."""
    t = time_BL[..., None]
    return ((1 - t) * mean_BLC - x_BLC) / t.square()


def velocity(x_BLC: Tensor, mean_BLC: Tensor, time_BL: Tensor) -> Tensor:
    """E[eps - q | x] from the posterior mean: (x - D) / t."""
    return (x_BLC - mean_BLC) / time_BL[..., None]


def score_identity(codes_BLC: Tensor, teacher_BLC: Tensor, guidance_BLC: Tensor, alpha: float = 1.0) -> Tensor:
    """Score identity distillation's loss (arXiv 2404.04057), in posterior means that are functions of x and so of q.

    As D_guidance is the mean of q given x, the squared difference is one of two regression errors,

        E |D_teacher - D_guidance|^2 = E |D_teacher - q|^2 - min_g E |g(x) - q|^2

    and so its gradient is the right side's with the best g held fixed as a function. Half of it is alpha = 1/2 in

        (D_teacher - D_guidance).(D_guidance - q) + (1 - alpha) |D_teacher - D_guidance|^2

    alpha = 1, which leaves the last term out, is the papers' choice. The squared difference itself with D_guidance held
    fixed may point the wrong way.

    Returns:
        [B,L], with whatever leads.
    """
    difference_BLC = teacher_BLC - guidance_BLC
    return (difference_BLC * (guidance_BLC - codes_BLC + (1 - alpha) * difference_BLC)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class NoisyCodes:
    """Codes at random noise levels."""

    x_RBLC: Tensor
    time_RBL: Tensor
    noise_RBLC: Tensor


def noisy_codes(codes_BLC: Tensor, draws: int, generator: torch.Generator) -> NoisyCodes:
    """x = (1-t) q + t eps, `draws` times; t even over [LEAST_TIME, 1], another one at each position.

    `generator` is one of the CPU.
    """
    B, L, C = codes_BLC.shape
    uniform_RBL = draw(torch.rand, (B, draws, L), generator).transpose(0, 1).to(codes_BLC.device)
    time_RBL = 1 - (1 - LEAST_TIME) * uniform_RBL
    noise_RBLC = draw(torch.randn, (B, draws, L, C), generator).transpose(0, 1).to(codes_BLC.device)
    t = time_RBL[..., None]
    return NoisyCodes(x_RBLC=(1 - t) * codes_BLC.float() + t * noise_RBLC, time_RBL=time_RBL, noise_RBLC=noise_RBLC)
