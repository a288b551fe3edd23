"""The weight of a loss's term, which may change along the run."""

from ddecode.arguments import check_finite

Weight = float | dict[float, float]
"""A number, or by the share of the run done the number that holds from there on: {0.5: 1.0} is 0 in the first half."""


def weight_at(weight: Weight, progress: float) -> float:
    """The number that holds after a share `progress` of the run."""
    if not isinstance(weight, dict):
        return weight
    begun = [share for share in weight if share <= progress]
    return weight[max(begun)] if begun else 0.0


def check_weight(name: str, weight: Weight) -> None:
    """Raises ValueError: a weight is negative or infinite, or holds from a share of the run that it does not have."""
    for value in weight.values() if isinstance(weight, dict) else [weight]:
        check_finite(name, value)
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {weight}")
    if isinstance(weight, dict) and not (weight and all(0 <= share < 1 for share in weight)):
        raise ValueError(f"{name}: shares of the run must lie in [0, 1), got {list(weight)}")
