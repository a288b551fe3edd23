"""Token matching: distribution matching distillation among the tokens themselves.

A student that emits all tokens at once has some conditional distribution of each token given those before it. A
guidance network, an AR model, learns it by plain cross-entropy on the student's own samples; the teacher's is known.
Where the two agree at every prefix that the student reaches, the distributions of whole sequences agree. So the student
is told, at each position and for each code, how much likelier it is under the guidance network than under the teacher.

It is DD2's idea (arXiv 2510.21003: conditional scores, the prefix held fixed) without the noise levels, and that of
distribution matching in discrete one-step generators (Di[M]O, arXiv 2503.15457), for teachers that read in order.

B batch, L token positions, V codes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.objectives.guidance import TokenGuidance
from ddecode.processes import mean_where
from ddecode.teacher import Recipe, Teacher

LEAST_LOG_PROB = -20.0
"""For metrics, in the place of what the teacher excludes."""


class TokenMatching(nn.Module):
    """The token-matching term, for positions that a student emits as tokens.

    At each position it moves the student's own weights pi over codes down

        sum_v pi_v clip( log q_v - log p_v ),    q the guidance network's, p the teacher's, given the tokens before

    which is zero where q = p; with q in the place of pi it is their reverse KL divergence. A student that drafts tells
    its conditional distribution itself, so pi is the softmax of its logits. DD1's takes the argmax of its logits: there
    pi is a softmax at a lower temperature, of which the codes near the maximum have nearly all.

    Args:
        teacher: frozen.
        guidance: trained beside the student.
        recipe: how the teacher's probabilities are guided and filtered; None is the teacher's own.
        temperature: of pi.
        clip: bound on the log-ratio; codes that the teacher excludes stand at it.
    """

    def __init__(
        self,
        teacher: Teacher,
        guidance: TokenGuidance,
        *,
        recipe: Recipe | None = None,
        temperature: float = 1.0,
        clip: float = 3.0,
    ) -> None:
        super().__init__()
        self.teacher, self.guidance = teacher, guidance
        self.recipe, self.temperature, self.clip = recipe or teacher.recipe, temperature, clip

    def forward(
        self, logits_BLV: Tensor, ids_BL: Tensor, labels_B: Tensor, open_BL: Tensor, pass_B: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Both sides' losses, means over open positions.

        Args:
            logits_BLV: the student's, with gradients.
            ids_BL: int64, what it emitted, behind a prefix that it emitted as well.
            labels_B: int64 [B], or captions.
            open_BL: bool, the positions that count.
            pass_B: int64, which kind of pass emitted them.

        Returns:
            The student's loss, which gives gradients to `logits_BLV` alone; the guidance network's, its cross-entropy
            on the emitted tokens; metrics: `guidance_cross_entropy`, `teacher_cross_entropy` of the same tokens, and
            `matching_gap`, the KL divergence of q from p, an estimate of the student's from the teacher per token. In
            both the teacher's log-probabilities are at least `LEAST_LOG_PROB`.
        """
        guided_BLV = self.guidance(ids_BL, labels_B, pass_B)
        open_BL = open_BL.float()
        error = mean_where(F.cross_entropy(guided_BLV.transpose(1, 2), ids_BL, reduction="none"), open_BL)
        with torch.no_grad():
            teacher_BLV = self.teacher.log_probs(ids_BL, labels_B, self.recipe).float()
            ours_BLV = guided_BLV.log_softmax(-1)
            told_BLV = teacher_BLV.clamp(min=LEAST_LOG_PROB)
            gap = mean_where((ours_BLV.exp() * (ours_BLV - told_BLV)).sum(-1), open_BL)
            surprise_BL = -told_BLV.gather(-1, ids_BL[..., None])[..., 0]
            ratio_BLV = (ours_BLV - teacher_BLV).clamp(-self.clip, self.clip)
        weights_BLV = torch.softmax(logits_BLV.float() / self.temperature, -1)
        loss = mean_where((weights_BLV * ratio_BLV).sum(-1), open_BL)
        metrics = {
            "matching_gap": gap,
            "guidance_cross_entropy": error.detach(),
            "teacher_cross_entropy": mean_where(surprise_BL, open_BL),
        }
        return loss, error, metrics
