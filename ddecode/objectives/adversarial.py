"""Adversarial distillation: discriminator heads on frozen features of the decoded output.

ADD (arXiv 2311.17042) and DMD2 (arXiv 2405.14867) add it to a distillation loss; the heads follow Projected GAN
(arXiv 2111.01007): a few convolutions on every stage of a network that is not trained, told the class by projection
(arXiv 1802.05637). Positives are the teacher's images, so that no data are needed, or real ones
(`ddecode.objectives.positives`).

B batch, H W height and width of a stage's map.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ddecode.evaluation.features import FeatureMaps


class DiscriminatorHead(nn.Module):
    """One verdict per place on one stage's features, conditioned on the class.

    Args:
        channels: of the stage.
        num_classes: of the labels.
        width: of the head.
    """

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            spectral_norm(nn.Conv2d(channels, width, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
            nn.LeakyReLU(0.2),
        )
        self.verdict = spectral_norm(nn.Conv2d(width, 1, 1))
        self.classes = spectral_norm(nn.Embedding(num_classes, width))

    def forward(self, stage_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """fp32 [B,HW]: above 0 it takes the place for a positive's."""
        h = self.body(stage_BCHW)
        projected = torch.einsum("bchw,bc->bhw", h, self.classes(labels_B))
        return (self.verdict(h)[:, 0] + projected).flatten(1).float()


class Discriminator(nn.Module):
    """Heads on every stage of a feature network.

    Args:
        widths: channels of the stages.
        num_classes: of the labels.
        width: of each head.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int, *, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(DiscriminatorHead(channels, num_classes, width) for channels in widths)

    def forward(self, maps: tuple[Tensor, ...], labels_B: Tensor) -> Tensor:
        """One stage's maps [B,C,H,W] each, to the mean verdict of each head, fp32 [B,heads]."""
        verdicts = [head(stage.float(), labels_B) for head, stage in zip(self.heads, maps, strict=True)]
        return torch.stack([places.mean(1) for places in verdicts], 1)


def adversarial_losses(
    discriminator: Discriminator, ours: FeatureMaps, theirs: FeatureMaps, labels_B: Tensor, labels_theirs_B: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Hinge losses of both sides (arXiv 1705.02894).

    Args:
        discriminator: trained by the second loss.
        ours: of the student's images, with gradients.
        theirs: of the positives.
        labels_B, labels_theirs_B: the classes of either.

    Returns:
        The student's loss, without gradients for the discriminator; the discriminator's, without gradients for the
        student; metrics: its mean verdict on either.
    """
    # one forward in training mode moves the power iterations of the spectral norm; the student's side is read as is
    theirs_BN = discriminator(tuple(stage.detach() for stage in theirs.stages), labels_theirs_B)
    ours_BN = discriminator(tuple(stage.detach() for stage in ours.stages), labels_B)
    critic_loss = F.relu(1 - theirs_BN).mean() + F.relu(1 + ours_BN).mean()
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    discriminator.eval()
    student_loss = -functional_call(discriminator, frozen, (ours.stages, labels_B)).mean()
    discriminator.train()
    metrics = {"verdict_positive": theirs_BN.detach().mean(), "verdict_student": ours_BN.detach().mean()}
    return student_loss, critic_loss, metrics
