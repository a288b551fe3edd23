"""DD2's objectives: conditional score distillation (arXiv 2510.21003), in posterior means.

At every position a code q is noised to x = (1-t) q + t eps, t being the noise level. What there is to know about q is
its posterior mean D = E[q | x, earlier tokens]; score and velocity follow from it and, unlike it, are 0/0 in their
usual form where a one-step generator stands, at t = 1. The teacher's D is exact, a softmax over the codebook. The
generator's D is learned by a guidance network; where the two agree at all t, so do the conditional distributions.

B batch, R noise draws that share one pass of a backbone, L token positions, V codes, C code width, D feature width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.diffusion_head import DiffusionHead
from ddecode.flow import augmented, centred
from ddecode.processes import mean_of_all, mean_of_processes
from ddecode.randomness import draw
from ddecode.teacher import Recipe, Teacher, forced_hidden, unroll
from ddecode.training import Objective
from ddecode.types import Backbone

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


class Guidance(nn.Module, ABC):
    """What is learned of a generator: the distribution of each position, given the tokens of earlier AR steps.

    `ARDiffusion` learns velocities, as DD2 does; `ddecode.objectives.matching.TokenGuidance` probabilities of tokens,
    which say the same of a generator that emits codes alone.
    """

    @abstractmethod
    def posterior_means(
        self, ids_BL: Tensor, labels: Any, noisy: NoisyCodes, codebook_VC: Tensor, pass_B: Tensor | None = None
    ) -> Tensor:
        """D of the noisy codes, fp32 [R,B,L,C], with gradients to them alone.

        Args:
            ids_BL: int64, in teacher order.
            labels: int64 [B], or captions.
            noisy: of the generator's output.
            codebook_VC: the codes.
            pass_B: int64, in which of its passes the generator emitted them, for networks that tell them apart; None
                is the first.
        """

    @abstractmethod
    def errors(
        self, ids_BL: Tensor, labels: Any, codes_BLC: Tensor, noisy: NoisyCodes, pass_B: Tensor | None = None
    ) -> Tensor:
        """What it gets wrong of codes whose nearest tokens are `ids_BL`, fp32 [B,L] with gradients to its weights."""

    @abstractmethod
    def sample(self, noise_BLC: Tensor, labels: Any, codebook_VC: Tensor, num_steps: int = 16) -> Tensor:
        """Tokens int64 [B,L] of the distribution it has learned, each from its own noise, fp32 standard normal."""


class ARDiffusion(Guidance):
    """An AR model whose head gives velocities of a noisy code instead of logits.

    It reads token ids as the teacher does, so position i knows the tokens of earlier AR steps only.

    Args:
        backbone: trained; its logit head is not used.
        codebook_VC: sets the scale of the head.
        width: of the head; None is the backbone's.
        depth: of the head.
    """

    def __init__(self, backbone: Backbone, codebook_VC: Tensor, *, width: int | None = None, depth: int = 3) -> None:
        super().__init__()
        assert isinstance(backbone, nn.Module)
        self.backbone = backbone
        self.head = DiffusionHead(backbone.width, codebook_VC.shape[1], width, depth).to(codebook_VC.device)
        self.head.calibrate(codebook_VC)

    @classmethod
    def from_teacher(cls, teacher: Teacher, *, width: int | None = None, depth: int = 3) -> "ARDiffusion":
        """A copy of the teacher's backbone under a fresh head."""
        return cls(teacher.trainable_backbone(), teacher.codebook_VC, width=width, depth=depth)

    def forward(self, ids_BL: Tensor, labels: Any, x_RBLC: Tensor, time_RBL: Tensor) -> Tensor:
        """Velocities of noisy codes, given the tokens before them.

        Args:
            ids_BL: int64, in teacher order.
            labels: int64 [B], or captions.
            x_RBLC: noisy codes; R may be left out.
            time_RBL: noise level in (0, 1].

        Returns:
            fp32, of x's shape.
        """
        return self.head(self.features(ids_BL, labels), x_RBLC, time_RBL)

    def features(self, ids_BL: Tensor, labels: Any) -> Tensor:
        """What the tokens of earlier AR steps say about each position: [B,L,D]."""
        return forced_hidden(self.backbone, ids_BL, self.backbone.condition(labels))

    def posterior_means(
        self, ids_BL: Tensor, labels: Any, noisy: NoisyCodes, codebook_VC: Tensor, pass_B: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            features_BLD = self.features(ids_BL, labels)
        frozen = {name: parameter.detach() for name, parameter in self.head.named_parameters()}
        arguments = (features_BLD, noisy.x_RBLC, noisy.time_RBL)
        velocity_RBLC: Tensor = functional_call(self.head, frozen, arguments)
        return noisy.x_RBLC - noisy.time_RBL[..., None] * velocity_RBLC

    def errors(
        self, ids_BL: Tensor, labels: Any, codes_BLC: Tensor, noisy: NoisyCodes, pass_B: Tensor | None = None
    ) -> Tensor:
        """Squared, of eps - q, whose mean is the velocity; the mean over noise draws and directions."""
        velocity_RBLC = self(ids_BL, labels, noisy.x_RBLC, noisy.time_RBL)
        return (velocity_RBLC - (noisy.noise_RBLC - codes_BLC)).square().mean((0, -1))

    @torch.no_grad()
    def sample(self, noise_BLC: Tensor, labels: Any, codebook_VC: Tensor, num_steps: int = 16) -> Tensor:
        """Tokens of the distribution it has learned, each from its own noise, as the teacher's map makes them.

        Position by position dx/dt = v runs from the noise at t = 1 to a code at t = 0, by Heun's method. It takes
        one pass of the backbone for each AR step, as plain sampling without guidance does, and 2 num_steps - 1
        evaluations of the head.

        Args:
            noise_BLC: standard normal fp32.
            labels: int64 [B], or captions.
            codebook_VC: the codes that a path may end on; the nearest counts.
            num_steps: steps of the ODE.

        Returns:
            ids int64 [B,L].
        """

        def read(hidden_BND: Tensor, step: int, start: int) -> Tensor:
            x_BNC = noise_BLC[:, start : start + hidden_BND.shape[1]]
            for k in reversed(range(num_steps)):
                now_BN, then_BN = (x_BNC.new_full(x_BNC.shape[:2], level / num_steps) for level in (k + 1, k))
                slope_BNC = self.head(hidden_BND, x_BNC, now_BN)
                if k:
                    ahead_BNC = self.head(hidden_BND, x_BNC - slope_BNC / num_steps, then_BN)
                    slope_BNC = (slope_BNC + ahead_BNC) / 2
                x_BNC = x_BNC - slope_BNC / num_steps
            return nearest_code(x_BNC, codebook_VC)

        return unroll(self.backbone, self.backbone.condition(labels), read)


class TuningObjective(Objective):
    """DD2's first stage, AR-diffusion tuning: a copy of the teacher learns to give velocities.

    Args:
        teacher: frozen.
        model: trained.
        recipe: how the teacher's probabilities are guided and filtered; None is the teacher's own.
        target: "analytic" regresses the exact velocity under the teacher's probabilities, "monte_carlo" eps - q, whose
            mean it is.
        draws: noise draws of each sequence.
    """

    def __init__(
        self,
        teacher: Teacher,
        model: ARDiffusion,
        *,
        recipe: Recipe | None = None,
        target: Literal["analytic", "monte_carlo"] = "analytic",
        draws: int = 4,
    ) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.teacher, self.model = teacher, model
        self.recipe, self.target, self.draws = recipe or teacher.recipe, target, draws

    def forward(
        self,
        noise_BLC: Tensor,
        ids_BL: Tensor,
        labels_B: Tensor,
        generator: torch.Generator,
        progress: float = 0.0,
        step: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity on teacher-sampled sequences; the pairs' own noise is not used."""
        codebook_VC = self.teacher.codebook_VC
        codes_BLC = F.embedding(ids_BL, codebook_VC)
        noisy = noisy_codes(codes_BLC, self.draws, generator)
        target_RBLC = noisy.noise_RBLC - codes_BLC
        if self.target == "analytic":
            log_probs_BLV = self.teacher.log_probs(ids_BL, labels_B, self.recipe)
            mean_RBLC = posterior_mean(noisy.x_RBLC, noisy.time_RBL, log_probs_BLV, codebook_VC)
            target_RBLC = velocity(noisy.x_RBLC, mean_RBLC, noisy.time_RBL)
        loss = F.mse_loss(self.model(ids_BL, labels_B, noisy.x_RBLC, noisy.time_RBL), target_RBLC)
        return loss, {"velocity_error": loss.detach()}


class ScoreTerm(nn.Module):
    """DD2's second stage, conditional score distillation, for any generator that emits vectors in R^C.

    The generator's own tokens are the prefix of every position. There the teacher's posterior mean is exact and the
    generator's is what `guidance` has learned of it; the emitted vector q moves so that the two meet.

    "dmd" follows the difference itself, as distribution matching distillation does (arXiv 2311.18828, eq. 7-8): the
    gradient on q is w (D_guidance - D_teacher). "sid" descends w times `score_identity`.

    w = 1 / mean |q - D_teacher| over the batch. A weight for each sample, as in the papers on images, grows without
    bound here: where q is a code and no other is likely, D_teacher is q.

    Args:
        teacher: frozen.
        guidance: trained by `guidance_loss`, beside the generator. One of velocities has to start from the first stage:
            what it gets wrong moves the generator as if that were wrong. One of tokens may start as the teacher.
        recipe: how the teacher's probabilities are guided and filtered; None is the teacher's own.
        form: see above.
        alpha: of `score_identity`.
        draws: noise draws of each sequence in `student_loss`.
        guidance_draws: the same in `guidance_loss`.
    """

    def __init__(
        self,
        teacher: Teacher,
        guidance: Guidance,
        *,
        recipe: Recipe | None = None,
        form: Literal["dmd", "sid"] = "dmd",
        alpha: float = 1.0,
        draws: int = 1,
        guidance_draws: int = 4,
    ) -> None:
        super().__init__()
        if min(draws, guidance_draws) < 1:
            raise ValueError(f"draws and guidance_draws must be at least 1, got {draws} and {guidance_draws}")
        self.teacher, self.guidance = teacher, guidance
        self.recipe, self.form, self.alpha = recipe or teacher.recipe, form, alpha
        self.draws, self.guidance_draws = draws, guidance_draws

    def student_loss(
        self,
        emitted_BLC: Tensor,
        labels_B: Tensor,
        open_BL: Tensor,
        generator: torch.Generator,
        *,
        pass_B: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What moves the generator; neither the guidance network nor the prefix gets a gradient.

        Args:
            emitted_BLC: with gradients: codes straight through their argmax, or continuous vectors.
            labels_B: int64 [B], or captions.
            open_BL: bool, the positions that the generator emitted; others are prefix only.
            generator: of the CPU.
            pass_B: see `Guidance.posterior_means`.

        Returns:
            The loss, a mean over open positions, and metrics: `score_gap`, the mean |D_teacher - D_guidance|, and
            `score_gap_L`, the same at each position.
        """
        emitted_BLC = emitted_BLC.float()
        codebook_VC = self.teacher.codebook_VC
        ids_BL = nearest_code(emitted_BLC.detach(), codebook_VC)
        log_probs_BLV = self.teacher.log_probs(ids_BL, labels_B, self.recipe)
        through = emitted_BLC if self.form == "sid" else emitted_BLC.detach()
        noisy = noisy_codes(through, self.draws, generator)
        teacher_RBLC = posterior_mean(noisy.x_RBLC, noisy.time_RBL, log_probs_BLV, codebook_VC)
        guidance_RBLC = self.guidance.posterior_means(ids_BL, labels_B, noisy, codebook_VC, pass_B)

        open_BL = open_BL.to(emitted_BLC.dtype)
        difference_RBLC = guidance_RBLC - teacher_RBLC
        with torch.no_grad():
            gap_BL = difference_RBLC.abs().mean((0, -1))
            scale_BL = (emitted_BLC - teacher_RBLC).abs().mean((0, -1))
            weight = 1 / mean_of_processes(mean_where(scale_BL, open_BL)).clamp(min=1e-6)
        if self.form == "dmd":
            step_BLC = (weight * difference_RBLC).mean(0)
            value_BL = (emitted_BLC - (emitted_BLC - step_BLC).detach()).square().sum(-1) / 2
        else:
            value_BL = weight * score_identity(emitted_BLC, teacher_RBLC, guidance_RBLC, self.alpha).mean(0)
        metrics = {"score_gap": mean_where(gap_BL, open_BL), "score_gap_L": mean_where(gap_BL, open_BL, 0)}
        return mean_where(value_BL, open_BL), metrics

    def guidance_loss(
        self,
        emitted_BLC: Tensor,
        labels_B: Tensor,
        generator: torch.Generator,
        open_BL: Tensor | None = None,
        *,
        pass_B: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What teaches the guidance network the generator's own distributions (`Guidance.errors`).

        Args:
            emitted_BLC: codes or continuous vectors; they get no gradient.
            labels_B: int64 [B], or captions.
            generator: of the CPU.
            open_BL: bool, the positions that the generator emitted; None is all.
            pass_B: see `Guidance.posterior_means`.

        Returns:
            The loss, a mean over open positions, and metrics: `guidance_error`, the same.
        """
        emitted_BLC = emitted_BLC.detach().float()
        noisy = noisy_codes(emitted_BLC, self.guidance_draws, generator)
        ids_BL = nearest_code(emitted_BLC, self.teacher.codebook_VC)
        error_BL = self.guidance.errors(ids_BL, labels_B, emitted_BLC, noisy, pass_B)
        loss = error_BL.mean() if open_BL is None else mean_where(error_BL, open_BL.to(error_BL.dtype))
        return loss, {"guidance_error": loss.detach()}


def mean_where(values_BL: Tensor, open_BL: Tensor, dim: int | None = None) -> Tensor:
    """Mean over all processes' open positions (1, not 0), along one dimension or both; 0 where none is."""
    if dim is None:
        return mean_of_all((values_BL * open_BL).sum(), open_BL.sum())
    return mean_of_all((values_BL * open_BL).sum(dim), open_BL.sum(dim))
