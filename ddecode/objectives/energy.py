"""The energy distance between batches of images: a term that sees the distribution, without a network to train.

B batch, N remembered samples, F feature width.
"""

import torch
from torch import Tensor, nn

LEAST_SPREAD = 0.1
"""Of the spread within classes over that of all, for `RememberedEnergy`."""
MOST_PUSH = 0.5
"""Bound on its multipliers."""


def energy_distance(ours_BF: Tensor, theirs_BF: Tensor, labels_B: Tensor) -> Tensor:
    """Energy distance between two sets of vectors within each class, unbiased (Székely & Rizzo 2013, eq. 6).

    2 E|x - y| - E|x - x'| over pairs of the same label and different index; E|y - y'| is constant and left out.
    Sample i of both sets may come from the same noise: that pair is left out as well.
    """
    across, within = (mean_distance(ours_BF, other, labels_B, labels_B) for other in (theirs_BF, ours_BF))
    return 2 * across - within


def standardise(ours_BF: Tensor, theirs_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Divide both by the spread of the second in each feature, and by the root of the feature count."""
    scale_F = (theirs_BF.std(0) + 1e-3) * theirs_BF.shape[1] ** 0.5
    return ours_BF / scale_F, theirs_BF / scale_F


class Memory(nn.Module):
    """The last N samples' features with their labels; empty places have the label -1.

    Its buffers are part of a checkpoint.
    """

    def __init__(self, samples: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features_NF", torch.zeros(samples, width))
        self.register_buffer("labels_N", torch.full((samples,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.features_NF: Tensor
        self.labels_N: Tensor
        self.place: Tensor

    def add(self, features_BF: Tensor, labels_B: Tensor) -> None:
        """Put them in the place of the oldest."""
        if not (samples := len(self.labels_N)):
            return
        features_BF, labels_B = features_BF[-samples:], labels_B[-samples:]
        at_B = (self.place + torch.arange(len(labels_B), device=labels_B.device)) % samples
        self.features_NF[at_B] = features_BF.detach().float()
        self.labels_N[at_B] = labels_B
        self.place.copy_((self.place + len(labels_B)) % samples)


class RememberedEnergy(nn.Module):
    """`energy_distance` of a batch with what came before it: the same expectation under less noise.

    The batch's own samples are set against the teacher's of many batches, which stay true, and against the student's of
    a few, which were made by nearly the same weights. Features are divided by their spread within the classes. The
    student's samples are of K kinds, one for each way of sampling: each kind has to have the teacher's distribution by
    itself, so that one which spreads too far does not make up for another that spreads too little.

    The other terms of a loss narrow the student's distribution. Against that, each kind can have a multiplier m, for
    the constraint that its mean distance within be the teacher's: the samples' push from one another counts 1 + m.

    Args:
        width: F.
        theirs: samples of the teacher to remember.
        ours: samples of the student to remember.
        kinds: K.
        spread_rate: by how much a step moves m, for each share that is missing to the teacher's mean distance.
    """

    def __init__(self, width: int, *, theirs: int, ours: int, kinds: int = 1, spread_rate: float = 0.0) -> None:
        super().__init__()
        self.theirs, self.ours = Memory(theirs, width), Memory(ours, width)
        self.spread_rate = spread_rate
        self.register_buffer("multiplier_K", torch.zeros(kinds))
        self.multiplier_K: Tensor

    def forward(
        self, ours_BF: Tensor, theirs_BF: Tensor, labels_B: Tensor, kind_B: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Then the batch is remembered.

        Sample i of both may come from the same noise: that pair is left out, as in `energy_distance`.

        Args:
            ours_BF, theirs_BF: features.
            labels_B: int64.
            kind_B: int64 of the student's samples, below K; None is 0 for all.

        Returns:
            2 E|x - y| - E|x - x'|, with the gradient on the batch's x of all of it; metric `spread_K`, each kind's mean
            distance within over the teacher's, 1 for a kind that is not in the batch.
        """
        K = len(self.multiplier_K)
        kind_B = torch.zeros_like(labels_B) if kind_B is None else kind_B
        group_B = labels_B * K + kind_B
        with torch.autocast(ours_BF.device.type, enabled=False):
            ours_BF, theirs_BF = ours_BF.float(), theirs_BF.detach().float()
            target_NF = torch.cat([theirs_BF, self.theirs.features_NF])
            target_N = torch.cat([labels_B, self.theirs.labels_N])
            # a class of one sample has no spread: what the batch has in all bounds it from below
            spread_F = spread_within(target_NF, target_N).clamp(min=LEAST_SPREAD * theirs_BF.std(0, correction=0))
            scale_F = (spread_F + 1e-3) * ours_BF.shape[1] ** 0.5
            other_NF = torch.cat([ours_BF.detach(), self.ours.features_NF])
            other_N = torch.cat([group_B, self.ours.labels_N])
            across_B = distance_to_peers(ours_BF / scale_F, target_NF / scale_F, labels_B, target_N)
            within_B = distance_to_peers(ours_BF / scale_F, other_NF / scale_F, group_B, other_N)
            theirs_B = distance_to_peers(theirs_BF / scale_F, target_NF / scale_F, labels_B, target_N)
        # without peers that it is pushed from, a sample would only be pulled, to the middle of its class
        across_B = across_B.where(~within_B.isnan(), torch.nan)
        self.theirs.add(theirs_BF, labels_B)
        self.ours.add(ours_BF, group_B)
        across, within = mean_of_known(across_B), mean_of_known(within_B)
        # x' is held fixed, so each pair's pull on its other end is made up for; the value stays the distance's
        pulled = 2 * (across - mean_of_known((1 + self.multiplier_K[kind_B]) * within_B))
        value = 2 * across - within
        spread_K = self.adjust(within_B.detach(), theirs_B, kind_B)
        return pulled + (value - pulled).detach(), {"spread_K": spread_K}

    def adjust(self, within_B: Tensor, theirs_B: Tensor, kind_B: Tensor) -> Tensor:
        """A step of dual ascent on each kind's multiplier; returns `spread_K`."""
        of_kind_KB = torch.arange(len(self.multiplier_K), device=kind_B.device)[:, None] == kind_B
        of_kind_KB = of_kind_KB & ~(within_B + theirs_B).isnan()
        within_K, theirs_K = ((d_B.nan_to_num() * of_kind_KB).sum(1) for d_B in (within_B, theirs_B))
        spread_K = torch.where(of_kind_KB.any(1), within_K / theirs_K, 1.0)
        self.multiplier_K += self.spread_rate * (1 - spread_K)
        self.multiplier_K.clamp_(-MOST_PUSH, MOST_PUSH)
        return spread_K


def spread_within(features_NF: Tensor, labels_N: Tensor) -> Tensor:
    """Root mean square deviation from the class means, [F]; label -1 does not count."""
    features_NF, labels_N = features_NF[labels_N >= 0], labels_N[labels_N >= 0]
    _, class_N = labels_N.unique(return_inverse=True)
    sums = features_NF.new_zeros(int(class_N.max()) + 1, features_NF.shape[1]).index_add_(0, class_N, features_NF)
    means = sums / class_N.bincount()[:, None]
    return (features_NF - means[class_N]).square().mean(0).sqrt()


def distance_to_peers(ours_BF: Tensor, others_NF: Tensor, labels_B: Tensor, labels_N: Tensor) -> Tensor:
    """Each sample's mean distance to the others of its label, [B]; the i-th to the i-th does not count, nan without."""
    same_BN = labels_B[:, None] == labels_N[None]
    same_BN[:, : len(labels_B)].fill_diagonal_(False)
    # cdist's gradient is zero at zero, where a vector meets itself; at least 1 keeps it finite without peers
    count_B = same_BN.sum(1)
    mean_B = (torch.cdist(ours_BF, others_NF) * same_BN).sum(1) / count_B.clamp(min=1)
    return mean_B.where(count_B > 0, mean_B.new_tensor(torch.nan))


def mean_of_known(values_B: Tensor) -> Tensor:
    """Of those that are not nan; 0 if all are."""
    return values_B.nansum() / (~values_B.isnan()).sum().clamp(min=1)


def mean_distance(ours_BF: Tensor, others_NF: Tensor, labels_B: Tensor, labels_N: Tensor) -> Tensor:
    """Mean distance over pairs of one label; ours' i-th to the others' i-th does not count."""
    same_BN = labels_B[:, None] == labels_N[None]
    same_BN[:, : len(labels_B)].fill_diagonal_(False)
    # cdist's gradient is zero at zero, where a vector meets itself
    return (torch.cdist(ours_BF, others_NF) * same_BN).sum() / same_BN.sum().clamp(min=1)
