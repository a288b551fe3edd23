"""Inception and its metrics: against torchmetrics, pytorch-fid and closed forms."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import seeded
from torch import Tensor, nn

from ddecode.evaluation.fidelity import (
    Inception,
    inception_score,
    kernel_distance,
    library,
    precision_recall,
)
from ddecode.evaluation.metrics import Gaussian, RunningMoments, fit_gaussian, frechet_distance

WIDTH = 24
pytestmark = pytest.mark.usefixtures("torchvision_loads")


def features(num: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, skewed and non-negative, as Inception's are."""
    mix = torch.randn(WIDTH, WIDTH, generator=seeded(99)) / WIDTH**0.5
    return (torch.randn(num, WIDTH, generator=seeded(seed)) @ mix + shift).relu() + 0.1


class Given(nn.Identity):
    """Stands where torchmetrics expects its network."""

    num_features = WIDTH


# --- metrics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [WIDTH // 2, 700], ids=["singular", "full rank"])
def test_frechet_distance_equals_the_libraries(num: int) -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image import FrechetInceptionDistance

    ours, real = features(num, 0), features(num + 5, 1, shift=0.2)
    moments = RunningMoments()
    for chunk in ours.split(100):
        moments.add(chunk.numpy())
    found = frechet_distance(moments.gaussian(), fit_gaussian(real.numpy()))
    (theirs,) = fid_statistics_to_metric(*map(fid_features_to_statistics, (ours, real)), verbose=False).values()
    metric = FrechetInceptionDistance(feature=Given())
    metric.update(ours, real=False)
    metric.update(real, real=True)
    assert found == pytest.approx(theirs, rel=1e-4)
    assert found == pytest.approx(metric.compute().item(), rel=1e-4)
    moments = [x for features_NF in (ours, real) for x in (features_NF.double().mean(0), features_NF.double().T.cov())]
    assert found == pytest.approx(calculate_frechet_distance(*(x.numpy() for x in moments)), rel=1e-4)


def test_running_moments_equal_those_of_all_features() -> None:
    x = np.random.default_rng(0).normal(1000, 1, (157, 5)).astype(np.float32)
    moments = RunningMoments()
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        moments.gaussian()
    for first, last in ((0, 1), (1, 60), (60, 157)):
        moments.add(x[first:last])
    expected, found = fit_gaussian(x), moments.gaussian()
    np.testing.assert_allclose(found.mean_F, expected.mean_F, rtol=1e-12)
    np.testing.assert_allclose(found.covariance_FF, expected.covariance_FF, rtol=1e-9)


def test_inception_score_equals_the_libraries() -> None:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
    from torchmetrics.image.inception import InceptionScore

    logits = 2 * torch.randn(20_000, 10, generator=seeded(0))
    found, theirs = inception_score(logits), isc_features_to_metric(logits)
    assert found.mean == pytest.approx(theirs[KEY_METRIC_ISC_MEAN])
    assert found.error == pytest.approx(theirs[KEY_METRIC_ISC_STD] / 3)
    metric = InceptionScore(feature=nn.Identity())
    metric.update(logits)
    with torch.random.fork_rng():
        assert found.mean == pytest.approx(metric.compute()[0].item(), rel=1e-3)


def test_inception_score_in_closed_form() -> None:
    """exp(H(y) - H(y|x)): 1 if all are alike, the number of classes if each is sure and classes are as many."""
    alike = inception_score(torch.randn(1, 8, generator=seeded(0)).expand(400, 8))
    assert (alike.mean, alike.error) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    sure = inception_score(100 * torch.eye(4).repeat(2000, 1))
    assert sure.mean == pytest.approx(4, rel=3e-3) and 0 < sure.error < 3e-3


def test_kernel_distance_equals_the_libraries() -> None:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    from torchmetrics.image import KernelInceptionDistance

    ours, real = features(260, 0), features(240, 1, shift=0.2)
    theirs = kid_features_to_metric(ours, real, kid_subset_size=240, verbose=False)
    assert kernel_distance(ours, real).mean == theirs[KEY_METRIC_KID_MEAN]
    ours = ours[:240]  # a subset is the whole, so that no draw of one matters
    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=240)
    metric.update(ours, real=False)
    metric.update(real, real=True)
    with torch.random.fork_rng():
        assert kernel_distance(ours, real).mean == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_the_kernel_distance_has_the_error_it_says() -> None:
    trials = [kernel_distance(features(60, 2 * i), features(60, 2 * i + 1)) for i in range(30)]
    means, errors = np.array([t.mean for t in trials]), np.array([t.error for t in trials])
    assert abs(means.mean()) < 3 * means.std() / 30**0.5, "equal distributions: unbiased"
    assert means.std() < errors.mean() < 4 * means.std(), "on the safe side: smaller parts vary more"


def test_precision_and_recall_in_closed_form() -> None:
    """Real images in two places, samples in one of them and in a third."""
    a, b, c = (torch.randn(60, 3, generator=seeded(i)) + 10 * i for i in range(3))
    samples, real = torch.cat([a[:30], c[:10]]), torch.cat([a[30:], b])
    precision, recall = precision_recall(torch.cat([real, real]), real)
    assert (precision, recall) == (1, 1)
    precision, recall = precision_recall(samples, real)
    assert 0.5 < precision < 31 / 40 and recall < 31 / 90


def test_precision_and_recall_equal_their_definition_and_the_library() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, real = features(330, 0), features(290, 1, shift=0.3)

    def inside(points: Tensor, balls: Tensor) -> float:
        apart = (balls[:, None].double() - balls[None].double()).norm(dim=2)
        radius = apart.sort(1).values[:, 3]
        return ((points[:, None].double() - balls[None].double()).norm(dim=2) <= radius).any(1).double().mean().item()

    precision, recall = precision_recall(ours, real)
    assert 0.05 < recall != precision < 0.99
    assert precision == pytest.approx(inside(ours, real), rel=1e-3)
    assert recall == pytest.approx(inside(real, ours), rel=1e-3)
    theirs = prc_features_to_metric(ours, real, verbose=False)
    assert (precision, recall) == (pytest.approx(theirs["precision"]), pytest.approx(theirs["recall"]))


@pytest.mark.parametrize("metric", [inception_score, kernel_distance, precision_recall])
def test_too_few_images_are_refused(metric: Any) -> None:
    few = [features(19, 0)] * (1 if metric is inception_score else 2)
    with pytest.raises(ValueError, match="at least 20 images, got 19"):
        metric(*few)


# --- Inception ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(torchvision_loads: None) -> dict[str, Tensor]:
    """Random weights under the published names, of a size that keeps signals alive."""
    stream = io.BytesIO()
    torch.save({}, stream)
    stream.seek(0)

    class Blank(library().FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: Any) -> None:
            assert state == {}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = Blank("blank", ["2048"], feature_extractor_weights_path=stream).state_dict()
    for value in found.values():
        if value.dim() == 4:
            value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=seeded(value.numel()))
    return {name: value for name, value in found.items() if not name.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=seeded(0))


def test_adm_sees_as_torch_fidelity_does(weights: Path, images: Tensor) -> None:
    inception = Inception.open(str(weights), resize="tensorflow")
    assert len(inception.hash) == 16 and not any(p.requires_grad for p in inception.network.parameters())
    seen = inception(images)
    reference = library().FeatureExtractorInceptionV3(
        "reference", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
    )
    pooled, logits = reference(images)
    assert torch.equal(seen.features_BF, pooled) and torch.equal(seen.logits_BK, logits)
    assert seen.features_BF.shape == (2, 2048) and seen.logits_BK.shape == (2, 1008)


def test_dd1_sees_as_pytorch_fid_does(
    weights: Path, state: dict[str, Tensor], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_fid import inception as upstream

    monkeypatch.setattr(upstream, "load_state_dict_from_url", lambda *args, **options: state)
    with torch.random.fork_rng():
        reference = upstream.InceptionV3([3]).eval()
    (expected,) = reference(images.float() / 255)
    ours = Inception.open(str(weights), resize="torch")
    seen = ours(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(seen.features_BF, expected.flatten(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.logits_BK, seen.features_BF @ state["fc.weight"].T)
    other = Inception(ours.network, resize="tensorflow", hash="")(images)
    assert (other.features_BF - seen.features_BF).abs().mean() > 1e-3, "protocols differ"


def test_weights_that_are_none_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint file"):
        Inception.open(str(tmp_path / "missing.pth"), resize="torch")
    save_file({name: value for name, value in state.items() if name != "fc.bias"}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors is not torch-fidelity's .*fc.bias"):
        Inception.open(str(tmp_path / "other.safetensors"), resize="torch")


def test_without_torch_fidelity_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        Inception.open("weights.pth", resize="torch")


def test_frechet_distance_of_unequal_widths_is_no_silent_number() -> None:
    a, b = (Gaussian(mean_F=np.zeros(n), covariance_FF=np.eye(n)) for n in (2, 3))
    with pytest.raises(ValueError):
        frechet_distance(a, b)
