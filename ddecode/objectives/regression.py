"""DD1's objective: regress the noise-token pairs (arXiv 2412.17153, section 3.2).

Cross-entropy on the logit head, and on what the student would emit, decoded to images, a perceptual distance to the
teacher's image. Beyond the paper, an energy distance compares the features of a batch of emitted images with those
of the teacher's images of the same class: it sees the distribution, so it restores the variance that regression loses.

B batch, L token positions, V codes, C code width, F feature width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.config import RegressionConfig, weight_at
from ddecode.evaluation.features import FeatureNetwork, perceptual_gap
from ddecode.student import Student


def energy_distance(ours_BF: Tensor, theirs_BF: Tensor, labels_B: Tensor) -> Tensor:
    """Energy distance between two sets of vectors within each class, unbiased (Székely & Rizzo 2013, eq. 6).

    2 E|x - y| - E|x - x'| over pairs of the same label and different index; E|y - y'| is constant and left out.
    Sample i of both sets may come from the same noise: that pair is left out as well.
    """
    same = (labels_B[:, None] == labels_B[None]).fill_diagonal_(False).float()
    pairs = same.sum().clamp(min=1)
    across = (torch.cdist(ours_BF, theirs_BF) * same).sum() / pairs
    # the root has no gradient at zero, where every vector meets itself
    gaps = (ours_BF[:, None] - ours_BF[None]).square().sum(-1)
    within = ((gaps + 1e-12).sqrt() * same).sum() / pairs
    return 2 * across - within


class RegressionObjective(nn.Module):
    """The loss of a student on a batch of pairs.

    Args:
        student: trained.
        features: frozen network of the image terms; needed where one of their weights is not 0.
        config: the weights of the terms.
    """

    def __init__(self, student: Student, features: FeatureNetwork | None, config: RegressionConfig) -> None:
        super().__init__()
        self.model, self.features, self.config = student, features, config
        if config.uses_images and features is None:
            raise ValueError("objective.perceptual and objective.energy need a feature network")
        self.starts = torch.tensor(student.starts)

    def forward(
        self, noise_BLC: Tensor, ids_BL: Tensor, labels_B: Tensor, generator: torch.Generator, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student, config = self.model, self.config
        batch, length = ids_BL.shape
        codes_BLC = F.embedding(ids_BL, student.codebook_VC)
        start_B = self.starts[torch.randint(len(self.starts), (batch,), generator=generator)].to(ids_BL.device)
        open_BL = torch.arange(length, device=ids_BL.device) >= start_B[:, None]
        perceptual, energy = weight_at(config.perceptual, progress), weight_at(config.energy, progress)
        sees_images = perceptual > 0 or energy > 0
        few = slice(0, config.image_batch if sees_images else 0)

        share = weight_at(config.own_prefix, progress)
        own_B = torch.zeros_like(start_B, dtype=torch.bool)
        own_B[few] = (torch.rand(batch, generator=generator).to(start_B.device) < share)[few] & (start_B[few] > 0)
        prefix_BLC = codes_BLC
        if bool(own_B.any()):
            first_pass = student.emit(noise_BLC[own_B], labels_B[own_B], 0, length)
            prefix_BLC = codes_BLC.clone()
            prefix_BLC[own_B] = first_pass.to(codes_BLC.dtype)
        sequence_BLC = torch.where(open_BL[..., None], noise_BLC, prefix_BLC)
        prediction = student(sequence_BLC, labels_B, start_B)

        # the pair's tokens follow from the teacher's prefix, not from the student's own
        counted_BL = open_BL & ~own_B[:, None]
        logits, targets = prediction.logits_BLV[counted_BL], ids_BL[counted_BL]
        cross_entropy = F.cross_entropy(logits, targets)
        squared = (prediction.embeddings_BLC - codes_BLC).square().sum(-1)[counted_BL].mean()
        loss = weight_at(config.logits, progress) * cross_entropy + weight_at(config.embeddings, progress) * squared
        metrics = {
            "cross_entropy": cross_entropy.detach(),
            "accuracy": (logits.argmax(-1) == targets).float().mean(),
            "embedding_error": squared.detach(),
        }
        if sees_images:
            emitted_BLC = emitted(student, prediction.logits_BLV[few], prediction.embeddings_BLC[few])
            emitted_BLC = torch.where(open_BL[few][..., None], emitted_BLC, prefix_BLC[few])
            gap_B, distance = self.image_terms(emitted_BLC, codes_BLC[few], labels_B[few])
            gap = gap_B[~own_B[few]].mean()
            loss = loss + perceptual * gap + energy * distance
            metrics |= {"perceptual": gap.detach(), "energy": distance.detach()}
        return loss, metrics

    def image_terms(self, emitted_BLC: Tensor, codes_BLC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Perceptual gap of each image [B], and the energy distance of the batch."""
        assert self.features is not None
        decode = self.model.tokenizer.decode
        ours = self.features(decode(emitted_BLC))
        with torch.no_grad():
            theirs = self.features(decode(codes_BLC))
        ours_BF, theirs_BF = standardise(ours.descriptors(), theirs.descriptors())
        return perceptual_gap(ours, theirs), energy_distance(ours_BF, theirs_BF, labels_B)


def emitted(student: Student, logits_BLV: Tensor, embeddings_BLC: Tensor) -> Tensor:
    """What sampling would emit, with gradients: argmax codes before `split` (straight through to the expected code),
    the continuous head after it."""
    split = student.split
    parts: Sequence[Tensor] = [embeddings_BLC[:, split:]]
    if split:
        weights = torch.softmax(logits_BLV[:, :split], -1)
        expected = weights @ student.codebook_VC
        hard = F.embedding(weights.argmax(-1), student.codebook_VC)
        parts = [expected + (hard - expected).detach(), *parts]
    return torch.cat(list(parts), 1)


def standardise(ours_BF: Tensor, theirs_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Divide both by the spread of the second in each feature, and by the root of the feature count."""
    scale_F = (theirs_BF.std(0) + 1e-3) * theirs_BF.shape[1] ** 0.5
    return ours_BF / scale_F, theirs_BF / scale_F
