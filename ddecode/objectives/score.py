"""DD2's second stage: conditional score distillation (arXiv 2510.21003), in posterior means.

The teacher's posterior mean D (`ddecode.objectives.posterior`) is exact, a softmax over the codebook. The generator's
is learned by a guidance network (`ddecode.objectives.guidance`); where the two agree at all noise levels, so do the
conditional distributions.

B batch, R noise draws that share one pass of a backbone, L token positions, C code width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ddecode.codebook import nearest_code
from ddecode.objectives.guidance import Guidance
from ddecode.objectives.posterior import noisy_codes, posterior_mean, score_identity
from ddecode.processes import mean_of_processes, mean_where
from ddecode.teacher import Recipe, Teacher


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
