"""Feature networks: they learn to tell classes apart or, where there are none, one image from all others.

B batch, K classes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ddecode.evaluation.features import FeatureNetwork
from ddecode.training import Objective

TEMPERATURE = 0.2


def crops(images_B3HW: Tensor, generator: torch.Generator, *, least: float, mirror: bool) -> Tensor:
    """Each image's random square of at least `least` of its side, enlarged to the full size; mirrored half the time."""
    batch = len(images_B3HW)
    share_B = least + (1 - least) * torch.rand(batch, generator=generator)
    place_B2 = (1 - share_B)[:, None] * (2 * torch.rand(batch, 2, generator=generator) - 1)
    mirrored_B = torch.rand(batch, generator=generator) < (0.5 if mirror else 0.0)
    affine_B23 = torch.zeros(batch, 2, 3)
    affine_B23[:, 0, 0] = torch.where(mirrored_B, -share_B, share_B)
    affine_B23[:, 1, 1] = share_B
    affine_B23[:, :, 2] = place_B2
    where = F.affine_grid(affine_B23.to(images_B3HW.device), list(images_B3HW.shape), align_corners=False)
    return F.grid_sample(images_B3HW, where, mode="bilinear", padding_mode="border", align_corners=False)


class RecognitionObjective(Objective):
    """What a feature network learns by.

    Args:
        network: trained.
        mirror: whether mirror images are to be taken for the same.
    """

    def __init__(self, network: FeatureNetwork, *, mirror: bool) -> None:
        super().__init__()
        self.model, self.mirror = network, mirror


class ClassObjective(RecognitionObjective):
    """Cross-entropy of the classes of slightly cropped images."""

    def forward(
        self, images_B3HW: Tensor, labels_B: Tensor, generator: torch.Generator, progress: float = 0.0, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_B3HW: fp32 in [-1,1]."""
        logits_BK = self.model(crops(images_B3HW, generator, least=0.85, mirror=self.mirror)).logits_BK.float()
        loss = F.cross_entropy(logits_BK, labels_B, label_smoothing=0.05)
        return loss, {"accuracy": (logits_BK.argmax(1) == labels_B).float().mean()}


class InstanceObjective(RecognitionObjective):
    """Two crops of an image are to be found among those of the batch (InfoNCE; SimCLR, arXiv 2002.05709, eq. 1, with
    colours left as they are, since those should be judged). The network's logits are the projection that is compared.
    """

    def forward(
        self, images_B3HW: Tensor, labels_B: Tensor, generator: torch.Generator, progress: float = 0.0, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_B3HW: fp32 in [-1,1]; labels are not read."""
        batch = len(images_B3HW)
        views = [crops(images_B3HW, generator, least=0.5, mirror=self.mirror) for _ in range(2)]
        projected_2BK = F.normalize(self.model(torch.cat(views)).logits_BK.float(), dim=1)
        likeness = projected_2BK @ projected_2BK.T / TEMPERATURE
        likeness = likeness.masked_fill(torch.eye(2 * batch, dtype=torch.bool, device=likeness.device), -math.inf)
        twins = torch.arange(2 * batch, device=likeness.device).roll(batch)
        loss = F.cross_entropy(likeness, twins)
        return loss, {"accuracy": (likeness.argmax(1) == twins).float().mean()}
