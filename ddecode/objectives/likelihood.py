"""Maximum likelihood of a teacher: cross-entropy under teacher forcing, with label dropping for guidance.

B batch, L token positions, V codes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.randomness import draw
from ddecode.teacher import Teacher
from ddecode.training import Objective


class LikelihoodObjective(Objective):
    """Cross-entropy of the tokens of real images.

    Args:
        teacher: its backbone is trained; its tokenizer is not touched.
        label_drop: share of labels replaced by the unconditional one.
    """

    def __init__(self, teacher: Teacher, *, label_drop: float = 0.1) -> None:
        super().__init__()
        assert isinstance(teacher.backbone, nn.Module)
        self.teacher, self.label_drop = teacher, label_drop
        self.model = teacher.backbone

    def forward(
        self, ids_BL: Tensor, labels_B: Tensor, generator: torch.Generator, progress: float = 0.0, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        drop_B = draw(torch.rand, (len(labels_B),), generator).to(labels_B.device) < self.label_drop
        labels_B = torch.where(drop_B, self.teacher.num_classes, labels_B)
        logits_BLV = self.teacher.forward(ids_BL, labels_B)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL.flatten())
        return loss, {"cross_entropy": loss.detach()}
