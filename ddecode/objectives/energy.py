"""The energy distance between batches of images: a term that sees the distribution, without a network to train.

B batch, F feature width.
"""

import torch
from torch import Tensor


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


def standardise(ours_BF: Tensor, theirs_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Divide both by the spread of the second in each feature, and by the root of the feature count."""
    scale_F = (theirs_BF.std(0) + 1e-3) * theirs_BF.shape[1] ** 0.5
    return ours_BF / scale_F, theirs_BF / scale_F
