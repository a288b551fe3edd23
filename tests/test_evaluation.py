"""Metrics against closed forms, and the `zoo` protocol on tiny models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from tiny import C, L, make_pipeline, seeded

from ddecode.checkpoint import zoo_folder
from ddecode.evaluation.features import FeatureNetwork, load_features, perceptual_distance
from ddecode.evaluation.metrics import (
    Gaussian,
    control_share,
    fit_gaussian,
    frechet_distance,
    intra_class_variance,
    jackknife,
    jackknife_error,
)
from ddecode.evaluation.results import as_json
from ddecode.evaluation.zoo import Judge, evaluate, judged, permute_within_class, table, variance_of
from ddecode.pipeline import DistilledPipeline


def gaussian(mean: list[float], variances: list[float]) -> Gaussian:
    return Gaussian(mean_F=np.array(mean), covariance_FF=np.diag(variances))


def random_gaussian(seed: int, width: int = 6, rank: int = 6) -> Gaussian:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(width, rank))
    return Gaussian(mean_F=rng.normal(size=width), covariance_FF=root @ root.T)


def test_frechet_distance_of_diagonal_gaussians_by_hand() -> None:
    a, b = gaussian([0, 1, 0], [1, 4, 9]), gaussian([3, 1, 4], [4, 4, 1])
    assert frechet_distance(a, b) == pytest.approx(25 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_equals_the_matrix_root(seed: int) -> None:
    a, b = random_gaussian(seed), random_gaussian(seed + 10)
    root = scipy.linalg.sqrtm(a.covariance_FF @ b.covariance_FF).real
    expected = np.square(a.mean_F - b.mean_F).sum() + np.trace(a.covariance_FF + b.covariance_FF - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances() -> None:
    a = random_gaussian(0, rank=2)
    moved = Gaussian(mean_F=a.mean_F + 1, covariance_FF=a.covariance_FF)
    assert frechet_distance(a, moved) == pytest.approx(6, abs=1e-5)


def test_a_gaussian_has_the_unbiased_covariance() -> None:
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    fitted = fit_gaussian(x)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    np.testing.assert_allclose(fitted.covariance_FF, centred.T @ centred / 39, rtol=1e-12)
    with pytest.raises(ValueError, match="at least 2 samples"):
        fit_gaussian(x[:1])


def test_control_share() -> None:
    assert control_share(student=3.0, floor=1.0, control=11.0) == pytest.approx(0.2)
    assert control_share(1.0, 1.0, 11.0) == 0 and control_share(11.0, 1.0, 11.0) == 1


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_jackknife_tells_the_spread_of_a_frechet_distance(shift: float) -> None:
    """Against the standard deviation over 100 draws: true where two sets differ, at most 1.4 times that where not."""
    rng = np.random.default_rng(0)

    def distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
        return frechet_distance(fit_gaussian(a_NF), fit_gaussian(b_NF))

    draws = [(rng.normal(shift, size=(200, 8)), rng.normal(size=(200, 8))) for _ in range(100)]
    spread = np.std([distance(*draw) for draw in draws], ddof=1)
    told = np.mean([jackknife_error(jackknife(distance, *draw)) for draw in draws])
    assert 0.8 * spread < told < 1.7 * spread, "beyond what 100 draws can tell"


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    numbers = np.random.default_rng(0).normal(size=(60, 1))
    told = jackknife_error(jackknife(lambda set_NF: float(set_NF.mean()), numbers, groups=60 // 2))
    pairs = numbers.reshape(30, 2).mean(1)
    assert told == pytest.approx(pairs.std(ddof=1) / 30**0.5)
    with pytest.raises(ValueError, match="needs 2 groups and 2 samples in each, got 31 of 60 samples"):
        jackknife(np.mean, numbers, groups=31)


def test_intra_class_variance_does_not_see_the_gap_between_classes() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 3
    x = rng.normal(size=(600, 4)) * np.array([1, 2, 3, 4])
    spread = intra_class_variance(x, labels)
    assert spread == pytest.approx(1 + 4 + 9 + 16, rel=0.1)
    assert intra_class_variance(x + 100 * labels[:, None], labels) == pytest.approx(spread)
    assert intra_class_variance(np.array([[0.0], [2.0], [7.0]]), np.array([0, 0, 1])) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least 2 samples"):
        intra_class_variance(x[:3], labels[:3])


def test_the_jackknife_tells_the_spread_of_a_variance_over_another() -> None:
    """Of N normal features each, a class's mean taken off: variances of relative error (2 / N)^1/2, two of them."""
    rng = np.random.default_rng(0)
    labels_N, width, told = np.arange(400) % 4, 8, []
    for _ in range(40):
        sets = [rng.normal(size=(400, width)) + labels_N[:, None] for _ in range(2)]
        assert variance_of(*sets, labels_N) == pytest.approx(1, abs=6 * 0.035)
        told.append(jackknife_error(jackknife(variance_of, *sets, labels_N)))
    assert np.mean(told) == pytest.approx((2 * 2 / (400 * width)) ** 0.5, rel=0.1)


def test_the_control_keeps_tokens_within_class_and_position() -> None:
    embeddings = torch.randn(60, L, C, generator=seeded(0))
    labels = np.arange(60) % 3
    permuted = permute_within_class(embeddings, labels, seed=1)
    moved = 0
    for label in range(3):
        rows = labels == label
        for position in range(L):
            a, b = embeddings[rows, position], permuted[rows, position]
            assert sorted(map(tuple, a.tolist())) == sorted(map(tuple, b.tolist()))
            moved += int((a != b).any(1).sum())
    assert moved > 0.8 * 60 * L
    owners = (permuted[:, :, None, 0] == embeddings[0, :, 0]).any(-1)
    assert owners.sum(1).max() < L, "no sample stays whole"
    assert torch.equal(permuted, permute_within_class(embeddings, labels, seed=1))
    assert not torch.equal(permuted, permute_within_class(embeddings, labels, seed=2))


@pytest.mark.parametrize("name", ["fashion-eval", "fashion-perceptual"])
def test_bundled_feature_networks_load_frozen(name: str) -> None:
    network = load_features(zoo_folder() / "features" / name)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    images = torch.rand(3, 3, 32, 32, generator=seeded(0)) * 2 - 1
    maps = network(images)
    assert maps.pooled_BF.shape[0] == 3 and maps.pooled_BF.isfinite().all()
    assert torch.equal(maps.pooled_BF, maps.stages[-1].mean((2, 3)))
    torch.testing.assert_close(network(images[1:2]).pooled_BF, maps.pooled_BF[1:2], atol=1e-5, rtol=1e-4)


def test_the_networks_of_judge_and_training_are_apart() -> None:
    a, b = (load_features(zoo_folder() / "features" / name) for name in ("fashion-eval", "fashion-perceptual"))
    images = torch.rand(20, 3, 32, 32, generator=seeded(0)) * 2 - 1
    x, y = a(images).pooled_BF, b(images).pooled_BF
    assert x.shape != y.shape or not torch.allclose(x, y, atol=1e-2)


def test_a_folder_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no feature network"):
        load_features(tmp_path)


def test_perceptual_distance_is_zero_for_equal_images_and_sends_gradients_to_the_first() -> None:
    network = FeatureNetwork(widths=(4, 8)).eval()
    images, target = torch.randn(2, 2, 3, 8, 8, generator=seeded(0))
    assert not perceptual_distance(network, images, images).any()
    images.requires_grad_()
    target.requires_grad_()
    gap = perceptual_distance(network, images, target)
    assert gap.shape == (2,) and (gap > 0).all()
    gap.sum().backward()
    assert images.grad.abs().max() > 0 and target.grad is None


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.open(zoo_folder() / "features" / "fashion-eval")


def test_the_protocol_measures_teacher_control_and_plans(pipe: DistilledPipeline, judge: Judge) -> None:
    plans = {"teacher": pipe.plan("teacher"), "1": pipe.plan(1), "teacher:0-16": pipe.plan(plan="teacher:0-16")}
    results = [
        evaluate(pipe, plans, judge, model="tiny", num=48, seed=3, batch=batch, show_progress=False)
        for batch in (48, 20)
    ]
    rows = {row.plan: row for row in results[0].rows}
    assert list(rows) == ["teacher", "control", "1", "teacher:0-16"]
    assert rows["teacher"].control_share == pytest.approx(0, abs=1e-9)
    assert rows["control"].control_share == pytest.approx(1)
    assert rows["1"].control_share_error > 0 and rows["control"].control_share_error == pytest.approx(0, abs=1e-9)
    assert all(0 < row.variance_error < row.variance for row in rows.values())
    assert (rows["teacher"].network_evaluations, rows["1"].network_evaluations) == (16, 1)
    assert rows["teacher:0-16"].frechet != rows["teacher"].frechet, "seeds are apart"
    assert all(row.frechet > 0 and 0 <= row.accuracy <= 1 and row.variance > 0 for row in rows.values())
    for a, b in zip(results[0].rows, results[1].rows, strict=True):
        assert a.frechet == pytest.approx(b.frechet, rel=0.01), "the batch size does not matter"

    facts = json.loads(as_json(results[0]))
    assert (facts["protocol"], facts["num"], facts["seed"], facts["model"]) == ("zoo", 48, 3, "tiny")
    assert facts["labels"] == "balanced, 12 of each of 4 classes" and facts["reference_hash"] == judge.hash
    assert facts["feature_hash"] == judge.hash and len(facts["rows"]) == 4
    assert len(table(results[0]).splitlines()) == 2 + 4


def test_all_plans_begin_at_the_same_noise(pipe: DistilledPipeline, judge: Judge) -> None:
    plans = {"mixed": pipe.plan(plan="teacher:0-4,student:4-16"), "1": pipe.plan(1), "again": pipe.plan(1)}
    *_, mixed, one, again = evaluate(pipe, plans, judge, model="tiny", num=40, show_progress=False).rows
    assert one == dataclasses.replace(again, plan="1")
    assert one.versus_first == pytest.approx(one.control_share - mixed.control_share) != 0
    assert one.versus_first_error > 0 and (mixed.versus_first, mixed.versus_first_error) == (None, None)
    *_, one, again = evaluate(
        pipe, {"1": plans["1"], "again": plans["1"]}, judge, model="tiny", num=8, show_progress=False
    ).rows
    assert (again.versus_first, again.versus_first_error, again.control_share_error) == (0, None, None)
    assert again.variance > 0 and again.variance_error is None


def test_without_a_teacher_figures_against_it_are_absent(pipe: DistilledPipeline, judge: Judge) -> None:
    alone = DistilledPipeline(tokenizer=pipe.tokenizer, student=pipe.student)
    (row,) = evaluate(alone, {"1": alone.plan(1)}, judge, model="tiny", num=8, show_progress=False).rows
    assert row.frechet > 0 and (row.ratio, row.control_share) == (row.variance, row.variance_error) == (None, None)


def test_half_precision_is_judged_by_the_images_that_a_call_gives(judge: Judge) -> None:
    pipe = make_pipeline().to(torch.bfloat16)
    embeddings, images = (pipe([0, 1, 2], generator=seeded(0), output_type=form).images for form in ("latent", "np"))
    np.testing.assert_array_equal(judged(judge, pipe, embeddings)["features"], judge.look(images)[0])


def test_too_few_samples_are_refused(pipe: DistilledPipeline, judge: Judge) -> None:
    with pytest.raises(ValueError, match="at least 8, two for each class, got 7"):
        evaluate(pipe, {}, judge, model="tiny", num=7, show_progress=False)


def test_a_judge_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="no statistics of real images"):
        Judge.open(zoo_folder() / "features" / "fashion-perceptual")
