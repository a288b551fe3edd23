"""The `zoo` protocol: how the bundled models are judged, and those that `ddecode train` makes.

Samples with balanced labels are rounded to 8 bits and seen by a small network that was trained on the same data set and
comes with its statistics of real images: for bundled models a classifier and the test images (`ddecode/zoo/features`),
for others what `ddecode.own_teacher` made of all their images. Four figures for each plan:

* the Fréchet distance to the real images, and its ratio to the teacher's;
* E, the share of the independent-token control's error: (FD(S,T) - FD(T',T)) / (FD(P,T) - FD(T',T)) with S the
  plan's samples, T and T' two sets of the teacher's, P the tokens of T' permuted within class and position. It is 0
  for the teacher's own distribution and 1 where tokens know nothing of each other, and it does not share the
  tokenizer's floor as the ratio does;
* label accuracy: the share of samples that the classifier gives their label, where there is more than one;
* intra-class variance of the features, as a share of the teacher's.

S, T, T' and P have seeds apart; the samples of all plans begin at the same noise.

N samples, L token positions, F feature width.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from ddecode.arguments import LARGEST_SEED, check_kind, check_pictures, check_whole
from ddecode.config import as_dict
from ddecode.evaluation.blocks import NOT_KEPT, Block, Blocks, counted, joined, progress_bar
from ddecode.evaluation.features import FeatureNetwork, load_features
from ddecode.evaluation.metrics import (
    Gaussian,
    control_share,
    fit_gaussian,
    frechet_distance,
    intra_class_variance,
    jackknife,
    jackknife_error,
)
from ddecode.evaluation.results import Result, label_balance, versions_of
from ddecode.files import read_tensors, write_aside
from ddecode.images import ROUNDING, to_uint8
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan
from ddecode.randomness import derived_seed, sample_generators
from ddecode.samples import batches_of, weights_hash

NUM = 5000
BATCH = 250
PERMUTED = 1
"""The stream of T', whose tokens the control permutes."""
PLANNED = 4
"""The stream of S, the same for all plans, so that they differ by what they are and less by what they drew."""
GROUPS = 20
"""Of samples, for the standard errors."""


@dataclass(frozen=True, kw_only=True)
class ZooRow:
    """One plan's figures; those that need the teacher are None for models without one."""

    plan: str
    network_evaluations: int
    frechet: float
    """Fréchet distance to the real images."""
    ratio: float | None
    """`frechet` over the teacher's."""
    control_share: float | None
    """E, as a fraction."""
    control_share_error: float | None
    """Its standard error, see `jackknife_error`: 0 for T' and P, whose E is fixed; None too for under 40 samples."""
    versus_first: float | None
    """E less that of the first plan asked for, None for that one; much of what both drew is gone from it."""
    versus_first_error: float | None
    """Its standard error."""
    accuracy: float | None
    """None where there is one class."""
    variance: float | None
    """Intra-class variance over the teacher's."""
    variance_error: float | None
    """Its standard error, of both sets; None too for under 40 samples."""


@dataclass(frozen=True, kw_only=True)
class ZooResult(Result):
    rows: tuple[ZooRow, ...]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A feature network with what it says of the real images."""

    network: FeatureNetwork
    real: Gaussian
    hash: str
    """Of both."""

    @classmethod
    def open(cls, folder: str | Path) -> "Judge":
        """Raises ValueError: the folder lacks the network or the statistics."""
        network, folder = load_features(folder), Path(folder)
        path = folder / "statistics.safetensors"
        if not path.is_file():
            raise ValueError(f"no statistics of real images in {folder}")
        statistics, width = read_tensors(path), network.widths[-1]
        if {n: tuple(t.shape) for n, t in statistics.items()} != {"mean": (width,), "covariance": (width, width)}:
            raise ValueError(f"{path} does not belong to the network beside it: expected a mean of {width} features")
        if not all(t.is_floating_point() and t.isfinite().all() for t in statistics.values()):
            raise ValueError(f"{path} is damaged: its statistics are not finite")
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes() + path.read_bytes()).hexdigest()
        real = Gaussian(mean_F=statistics["mean"].numpy(), covariance_FF=statistics["covariance"].numpy())
        return cls(network=network, real=real, hash=digest[:16])

    @torch.no_grad()
    def look(self, images_NHW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images to features fp32 [N,F] and predicted classes int64 [N].

        Raises:
            ValueError: the images are no uint8 array, or none.
        """
        check_pictures(images_NHW3)
        features, predicted = [], []
        for chunk in torch.from_numpy(images_NHW3).split(250):
            maps = self.network(chunk.permute(0, 3, 1, 2).float() / 127.5 - 1)
            features.append(maps.pooled_BF)
            predicted.append(maps.logits_BK.argmax(1))
        return torch.cat(features).numpy(), torch.cat(predicted).numpy()


def write_statistics(folder: Path, images_NHW3: np.ndarray) -> None:
    """Let the feature network in `folder` judge by these real images, uint8."""
    nothing = Gaussian(mean_F=np.zeros(0), covariance_FF=np.zeros((0, 0)))
    features_NF, _ = Judge(network=load_features(folder), real=nothing, hash="").look(images_NHW3)
    real = fit_gaussian(features_NF)
    statistics = {"mean": real.mean_F, "covariance": real.covariance_FF}
    write_aside(folder / "statistics.safetensors", save(statistics))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A sample set as the judge sees it."""

    features_NF: np.ndarray
    labels_N: np.ndarray
    accuracy: float | None
    network_evaluations: int

    @property
    def gaussian(self) -> Gaussian:
        return fit_gaussian(self.features_NF)


def evaluate(
    pipe: DistilledPipeline,
    plans: dict[str, Plan],
    judge: Judge,
    *,
    model: str,
    num: int,
    seed: int = 0,
    batch: int = BATCH,
    blocks: Blocks = NOT_KEPT,
    show_progress: bool = True,
) -> ZooResult:
    """Judge plans by the `zoo` protocol.

    Args:
        pipe: the models.
        plans: by the name their row shall carry; `teacher` is always measured where the pipe has one.
        judge: feature network and real statistics.
        model: its name, for the record.
        num: samples of each set; at least 2 for each class.
        seed: the teacher's sets and the plans' never share noise.
        blocks: what is kept of an evaluation that was stopped.

    Raises:
        ValueError: num is too small, or the judge knows fewer classes.
    """
    check_kind("pipe", pipe, DistilledPipeline)
    check_kind("plans", plans, Mapping)
    check_kind("judge", judge, Judge)
    if pipe.num_classes > judge.network.num_classes:
        raise ValueError(f"the feature network knows {judge.network.num_classes} classes, the model {pipe.num_classes}")
    for plan in plans.values():
        check_kind("a plan", plan, Plan)
    check_whole("--num", num, 1)
    check_whole("--seed", seed, 0, LARGEST_SEED)
    if num < 2 * pipe.num_classes:
        raise ValueError(f"--num must be at least {2 * pipe.num_classes}, two for each class, got {num}")
    labels_N = np.arange(num) % pipe.num_classes
    drawn = {name: plan for name, plan in plans.items() if name != "teacher"}
    sets, begun = len(drawn) + (3 if pipe.teacher is not None else 0), count(1)

    def look(plan: Plan, stream: int, see: Callable[[Any], Block], pieces: Iterable[Any]) -> Block:
        def identity() -> dict[str, Any]:
            made = {"weights": weights_hash(pipe, plan), "plan": str(plan), "recipe": as_dict(pipe.recipe)}
            return made | {"stream": stream, "seed": seed, "num": num, "batch": batch, "features": judge.hash}

        with progress_bar(num, show_progress, f"set {next(begun)} of {sets}") as bar:
            return joined(counted(blocks.of(identity, see, pieces), bar))

    def draw(plan: Plan, stream: int) -> Block:
        def see(part: range) -> Block:
            generators = sample_generators(derived_seed(seed, stream), part)
            progress = pipe.emit(torch.from_numpy(labels_N[part.start : part.stop]), plan, generators)
            block = judged(judge, pipe, progress.embeddings_BLC)
            if stream == PERMUTED:
                block["embeddings"] = progress.embeddings_BLC.cpu().numpy()
            return block | {"evaluations": np.full(len(part), progress.network_evaluations)}

        return look(plan, stream, see, batches_of(num, batch))

    teacher: Seen | None = None
    if pipe.teacher is not None:
        whole = pipe.plan("teacher")
        teacher = seen_of(draw(whole, 0), labels_N)
        tokens = draw(whole, PERMUTED)
        other = seen_of(tokens, labels_N)
        permuted = permute_within_class(torch.from_numpy(tokens["embeddings"]), labels_N, derived_seed(seed, 2))
        chunks = permuted.to(pipe.device).split(batch)
        control_seen = seen_of(look(whole, 2, partial(judged, judge, pipe), chunks), labels_N)

    shares: list[tuple[float, np.ndarray]] = []
    """E of each plan so far, and its values without one group of samples after another."""

    def row(name: str, seen: Seen, *, planned: bool = True) -> ZooRow:
        frechet = frechet_distance(seen.gaussian, judge.real)
        share = ratio = variance = versus = error = versus_error = variance_error = None
        if teacher is not None:
            ratio = frechet / frechet_distance(teacher.gaussian, judge.real)
            spread_sets = seen.features_NF, teacher.features_NF, labels_N
            share_sets = tuple(each.features_NF for each in (seen, teacher, other, control_seen))
            variance, share = variance_of(*spread_sets), share_of(*share_sets)
            values_G = np.zeros(0)
            if num >= 2 * GROUPS:
                values_G = jackknife(share_of, *share_sets, groups=GROUPS)
                error = jackknife_error(values_G)
                variance_error = jackknife_error(jackknife(variance_of, *spread_sets, groups=GROUPS))
            if shares:
                first, first_G = shares[0]
                versus = share - first
                versus_error = jackknife_error(values_G - first_G) if len(values_G) else None
            if planned:
                shares.append((share, values_G))
        return ZooRow(
            plan=name,
            network_evaluations=seen.network_evaluations,
            frechet=frechet,
            ratio=ratio,
            control_share=share,
            control_share_error=error,
            versus_first=versus,
            versus_first_error=versus_error,
            accuracy=seen.accuracy,
            variance=variance,
            variance_error=variance_error,
        )

    rows = []
    if teacher is not None:
        rows += [row("teacher", other, planned=False), row("control", control_seen, planned=False)]
    rows += [row(name, seen_of(draw(plan, PLANNED), labels_N)) for name, plan in drawn.items()]
    return ZooResult(
        protocol="zoo",
        model=model,
        num=num,
        seed=seed,
        labels=label_balance("balanced", labels_N),
        rounding=ROUNDING,
        feature_hash=judge.hash,
        reference_hash=judge.hash,
        versions=versions_of("torch", "numpy"),
        rows=tuple(rows),
    )


def judged(judge: Judge, pipe: DistilledPipeline, embeddings_BLC: Tensor) -> Block:
    """`features` [B,F] and `predicted` [B] of the images."""
    features_BF, predicted_B = judge.look(to_uint8(pipe.decode(embeddings_BLC)))
    return {"features": features_BF, "predicted": predicted_B}


def seen_of(whole: Block, labels_N: np.ndarray) -> Seen:
    """Of a set's blocks together."""
    return Seen(
        features_NF=whole["features"],
        labels_N=labels_N,
        accuracy=float((whole["predicted"] == labels_N).mean()) if labels_N.any() else None,
        network_evaluations=int(whole["evaluations"].max()) if "evaluations" in whole else 0,
    )


def share_of(plan_NF: np.ndarray, teacher_NF: np.ndarray, other_NF: np.ndarray, control_NF: np.ndarray) -> float:
    """E, of the features of S, T, T' and P."""
    whole = fit_gaussian(teacher_NF)
    return control_share(*(frechet_distance(fit_gaussian(each), whole) for each in (plan_NF, other_NF, control_NF)))


def variance_of(plan_NF: np.ndarray, teacher_NF: np.ndarray, labels_N: np.ndarray) -> float:
    """Of the features of S and T, which share their labels."""
    return intra_class_variance(plan_NF, labels_N) / intra_class_variance(teacher_NF, labels_N)


def permute_within_class(embeddings_NLC: Tensor, labels_N: np.ndarray, seed: int) -> Tensor:
    """The control P: at every position, the tokens of a class change owners independently."""
    rng = np.random.default_rng(seed)
    permuted = embeddings_NLC.clone()
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        for position in range(embeddings_NLC.shape[1]):
            permuted[rows, position] = embeddings_NLC[rng.permutation(rows), position]
    return permuted


def table(result: ZooResult) -> str:
    """The rows for people."""
    lines = [
        f"protocol zoo, n {result.num} a set, seed {result.seed}, features {result.feature_hash}",
        f"{'plan':34} {'passes':>6} {'FD real':>8} {'ratio':>6} {'E':>8} {'±':>6} "
        f"{'vs first':>8} {'±':>6} {'accuracy':>8} {'variance':>8} {'±':>6}",
    ]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in result.rows:
        passes = str(row.network_evaluations or "-")
        lines.append(
            f"{row.plan:34} {passes:>6} {row.frechet:8.3f} {cell(row.ratio, '.2f'):>6} "
            f"{cell(row.control_share, '.2%'):>8} {cell(row.control_share_error, '.2%'):>6} "
            f"{cell(row.versus_first, '.2%'):>8} {cell(row.versus_first_error, '.2%'):>6} "
            f"{cell(row.accuracy, '.2%'):>8} {cell(row.variance, '.3f'):>8} "
            f"{cell(row.variance_error, '.3f'):>6}"
        )
    return "\n".join(lines)
