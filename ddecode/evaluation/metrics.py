"""Distances between sets of features.

N samples, F feature width; everything in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddecode.arguments import check_kind, shown


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean and covariance of a feature set."""

    mean_F: np.ndarray
    covariance_FF: np.ndarray


def as_features(features_NF: Any) -> np.ndarray:
    """float64 [N,F].

    Raises:
        ValueError: they are no matrix of finite numbers.
    """
    features = np.asarray(features_NF, np.float64)
    if features.ndim != 2 or not features.shape[1] or not np.isfinite(features).all():
        raise ValueError(f"features must be finite numbers [N, F], got {shown(features_NF)}")
    return features


def fit_gaussian(features_NF: np.ndarray) -> Gaussian:
    """Sample mean and unbiased covariance.

    Raises:
        ValueError: fewer than two samples, or features that are not finite.
    """
    features = as_features(features_NF)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}")
    return Gaussian(mean_F=features.mean(0), covariance_FF=np.atleast_2d(np.cov(features, rowvar=False)))


class RunningMoments:
    """`fit_gaussian` of features that come in batches; memory does not grow with N."""

    def __init__(self) -> None:
        self.count = 0
        self.origin_F: np.ndarray | None = None
        """Near the mean, so that little cancels."""

    def add(self, features_BF: np.ndarray) -> None:
        features = np.asarray(features_BF, np.float64)
        if self.origin_F is None:
            self.origin_F = features.mean(0)
            self.sum_F = np.zeros_like(self.origin_F)
            self.products_FF = np.zeros((len(self.origin_F), len(self.origin_F)))
        shifted = features - self.origin_F
        self.count += len(features)
        self.sum_F += shifted.sum(0)
        self.products_FF += shifted.T @ shifted

    def gaussian(self) -> Gaussian:
        """
        Raises:
            ValueError: fewer than two samples.
        """
        if self.origin_F is None or self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        mean_F = self.sum_F / self.count
        covariance_FF = (self.products_FF - self.count * np.outer(mean_F, mean_F)) / (self.count - 1)
        return Gaussian(mean_F=self.origin_F + mean_F, covariance_FF=covariance_FF)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance of two Gaussians (Heusel et al. 2017, eq. 6).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); the symmetric form keeps every root real.

    Raises:
        ValueError: they are of other widths.
    """
    for gaussian in (a, b):
        check_kind("what is compared", gaussian, Gaussian)
    if a.mean_F.shape != b.mean_F.shape:
        raise ValueError(f"a Fréchet distance is of features of one width, got {a.mean_F.size} and {b.mean_F.size}")
    values, vectors = np.linalg.eigh(a.covariance_FF)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ b.covariance_FF @ root_a)
    trace = np.trace(a.covariance_FF) + np.trace(b.covariance_FF) - 2 * np.sqrt(cross.clip(min=0)).sum()
    return float(np.square(a.mean_F - b.mean_F).sum() + trace)


def control_share(student: float, floor: float, control: float) -> float:
    """The share of the independent-token control's error that a student has: 0 as its teacher, 1 no better than
    the control.

    E = (FD(S,T) - FD(T',T)) / (FD(P,T) - FD(T',T)): `student` = FD(S,T), `floor` = FD(T',T), `control` = FD(P,T).
    """
    return (student - floor) / (control - floor)


def jackknife(statistic: Callable[..., float], *sets_NF: np.ndarray, groups: int = 20) -> np.ndarray:
    """A statistic of sample sets without one group of samples of each set after another: float64 [groups].

    A group is a run of N / groups samples. The difference of two statistics has the difference of their values.

    Raises:
        ValueError: fewer than two groups, or fewer than two samples in each.
    """
    least = min(map(len, sets_NF))
    if groups < 2 or least < 2 * groups:
        raise ValueError(f"a jackknife needs 2 groups and 2 samples in each, got {groups} of {least} samples")

    def without(group: int) -> list[np.ndarray]:
        return [np.delete(set_NF, np.array_split(np.arange(len(set_NF)), groups)[group], 0) for set_NF in sets_NF]

    return np.array([statistic(*without(group)) for group in range(groups)])


def jackknife_error(values_G: np.ndarray) -> float:
    """Standard error of a statistic from its values without each of G groups (the delete-a-group jackknife).

    A Fréchet distance grows with the square of the gap, so where two sets are of one distribution this errs on the
    large side, by a factor of up to 1.4.
    """
    return float(np.std(values_G) * (len(values_G) - 1) ** 0.5)


def intra_class_variance(features_NF: np.ndarray, labels_N: np.ndarray) -> float:
    """Trace of the feature covariance inside a class, averaged over the classes present.

    Raises:
        ValueError: features are not finite, labels are not one for each, or no class has two samples.
    """
    features, labels_N = as_features(features_NF), np.asarray(labels_N)
    if labels_N.shape != (len(features),):
        raise ValueError(f"{len(features)} samples need a label each, got labels {shown(labels_N)}")
    per_class = [
        features[labels_N == label].var(0, ddof=1).sum()
        for label in np.unique(labels_N)
        if (labels_N == label).sum() > 1
    ]
    if not per_class:
        raise ValueError("intra-class variance needs a class with at least 2 samples")
    return float(np.mean(per_class))
