"""DD2's first stage, AR-diffusion tuning (arXiv 2510.21003): it prepares a guidance network of velocities.

B batch, R noise draws that share one pass of a backbone, L token positions, C code width.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ddecode.objectives.guidance import ARDiffusion
from ddecode.objectives.posterior import noisy_codes, posterior_mean, velocity
from ddecode.teacher import Recipe, Teacher
from ddecode.training import Objective


class TuningObjective(Objective):
    """A copy of the teacher learns to give velocities.

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
