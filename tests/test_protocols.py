"""The protocols `adm` and `dd1` with a stand-in for Inception: models, images on disk, references, comparison."""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Capture, refused, run
from tiny import seeded
from torch import Tensor
from torch.nn import functional as F

from ddecode.evaluation.fidelity import Extracted, Inception
from ddecode.evaluation.metrics import fit_gaussian, frechet_distance
from ddecode.evaluation.protocols import PROTOCOLS, Inspector, evaluate, evaluate_images
from ddecode.evaluation.reference import Reference, read_statistics, see
from ddecode.images import ImageSet
from ddecode.pipeline import DistilledPipeline
from ddecode.randomness import sample_generators
from ddecode.samples import draw_labels

pytestmark = pytest.mark.usefixtures("torchvision_loads")
WIDTH = 12
NUM = 40


class StandIn:
    """12 features, means over quarters of the image; 6 logits."""

    hash = "stand-in"

    def __call__(self, images_B3HW: Tensor) -> Extracted:
        assert images_B3HW.dtype == torch.uint8 and images_B3HW.shape[1] == 3
        features_BF = F.adaptive_avg_pool2d(images_B3HW.float() / 32, 2).flatten(1)
        return Extracted(features_BF=features_BF, logits_BK=features_BF @ torch.randn(WIDTH, 6, generator=seeded(0)))


def seen(images_NHW3: np.ndarray) -> np.ndarray:
    return StandIn()(torch.from_numpy(images_NHW3).permute(0, 3, 1, 2)).features_BF.numpy()


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)


@pytest.fixture
def reference(real: np.ndarray, tmp_path: Path) -> Path:
    """As guided-diffusion's: statistics of more images than are in the file."""
    fitted = fit_gaussian(np.concatenate([seen(real), seen(255 - real)]))
    np.savez(tmp_path / "virtual.npz", arr_0=real, mu=fitted.mean_F, sigma=fitted.covariance_FF, mu_s=0, sigma_s=0)
    return tmp_path / "virtual.npz"


def inspector(protocol: str, reference: Path) -> Inspector:
    opened = Reference.open(reference, StandIn(), show_progress=False)
    return Inspector(protocol=PROTOCOLS[protocol], extractor=StandIn(), reference=opened)


# --- models ---------------------------------------------------------------------------------------------------


def test_adm_measures_plans(pipe: DistilledPipeline, reference: Path) -> None:
    plans = {"1": pipe.plan(1), "teacher": pipe.plan("teacher")}
    judge = inspector("adm", reference)
    result = evaluate(pipe, plans, judge, model="tiny", num=NUM, seed=3, batch=16, show_progress=False)
    assert [(row.plan, row.network_evaluations) for row in result.rows] == [("1", 1), ("teacher", 16)]
    assert result.labels == "balanced, 10 of each of 4 classes" and "round((x+1)*127.5)" in result.rounding
    assert (result.protocol, result.num, result.seed, result.feature_hash) == ("adm", NUM, 3, "stand-in")
    assert {"ddecode", "torch", "numpy", "torch-fidelity"} == set(result.versions)
    images = pipe(
        [i % 4 for i in range(NUM)], num_inference_steps=1, generator=sample_generators(3, range(NUM)), output_type="np"
    ).images
    expected = frechet_distance(fit_gaussian(seen(images)), judge.reference.real)
    assert result.rows[0].fid == pytest.approx(expected, rel=0.02), "whatever the batch; a level of a pixel may differ"
    assert all(isinstance(value, float) for row in result.rows for value in (row.precision, row.recall, row.kid))
    with pytest.raises(ValueError, match="must be a multiple of the 4 classes, got 42"):
        evaluate(pipe, plans, judge, model="tiny", num=42)
    with pytest.raises(ValueError, match="at least 20, got 16"):
        evaluate(pipe, plans, judge, model="tiny", num=16)


def test_a_rows_figures_are_the_libraries_on_the_same_features(reference: Path, real: np.ndarray) -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    judge = inspector("adm", reference)
    images = np.random.default_rng(1).integers(0, 250, (NUM, 8, 8, 3), np.uint8)
    row = judge.row([see(StandIn(), part) for part in (images[:7], images[7:])], plan="x", network_evaluations=1)
    extracted = StandIn()(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours, theirs = extracted.features_BF, torch.from_numpy(seen(real))
    fitted = fit_gaussian(ours.numpy())
    statistics = (*vars(fitted).values(), *vars(judge.reference.real).values())
    expected = {
        "fid": calculate_frechet_distance(*statistics),
        "inception_score": isc_features_to_metric(extracted.logits_BK)["inception_score_mean"],
        "kid": kid_features_to_metric(ours, theirs, kid_subset_size=NUM, verbose=False)[
            "kernel_inception_distance_mean"
        ],
    } | prc_features_to_metric(ours, theirs, verbose=False)
    found = {name: getattr(row, name) for name in ("fid", "inception_score", "kid", "precision", "recall")}
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-3)
    assert 0 < row.precision < 1 and 0 < row.recall < 1 and row.kid_error > 0 and row.inception_score_error > 0


def test_dd1_has_uniform_labels_and_may_have_statistics_alone(
    pipe: DistilledPipeline, reference: Path, tmp_path: Path
) -> None:
    fitted = read_statistics(reference)
    assert fitted is not None
    torch.save({"m": fitted.mean_F, "s": fitted.covariance_FF}, tmp_path / "statistic.pth")
    judge = inspector("dd1", tmp_path / "statistic.pth")
    labels = draw_labels(range(4), NUM, labelling="uniform", seed=1)
    asked: list[int] = []

    class Recording(DistilledPipeline):
        def emit(self, class_labels: Any, *options: Any) -> Any:
            asked.extend(class_labels)
            return super().emit(class_labels, *options)

    recording = Recording(tokenizer=pipe.tokenizer, student=pipe.student)
    result = evaluate(
        recording, {"1": pipe.plan(1)}, judge, model="tiny", num=NUM, seed=1, batch=16, show_progress=False
    )
    assert asked == labels.tolist() and result.labels.startswith("uniform, ")
    (row,) = result.rows
    assert row.fid > 0 and row.inception_score > 1
    assert (row.precision, row.recall, row.kid, row.kid_error) == (None,) * 4


# --- references -----------------------------------------------------------------------------------------------


def test_a_reference_of_images_alone_has_their_statistics(real: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=real)
    found, expected = (
        Reference.open(tmp_path / "x.npz", StandIn(), batch=7, show_progress=False),
        fit_gaussian(seen(real)),
    )
    np.testing.assert_allclose(found.real.covariance_FF, expected.covariance_FF, atol=1e-6)
    assert found.features_NF is not None
    np.testing.assert_allclose(found.features_NF.numpy(), seen(real), rtol=1e-5)


def test_statistics_that_numpy_1_pickled_are_read(tmp_path: Path) -> None:
    """DD1's are older than numpy 2, which calls one module otherwise."""
    torch.save({"m": np.ones(3, np.float32), "s": np.eye(3)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    found = read_statistics(tmp_path / "old.pth")
    assert found is not None and found.mean_F.tolist() == [1, 1, 1] and found.covariance_FF.dtype == np.float64


def test_references_that_are_none_are_refused(tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(ValueError) as caught:
            Reference.open(tmp_path / name, StandIn(), show_progress=False)
        return str(caught.value)

    assert "there is no reference" in refusal("missing.npz")
    assert "holds no images" in refusal(".")
    (tmp_path / "junk.npz").write_text("junk")
    assert "damaged" in refusal("junk.npz")
    np.savez(tmp_path / "mean.npz", mu=np.zeros(WIDTH))
    assert "neither statistics (mu and sigma) nor images (arr_0)" in refusal("mean.npz")
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    assert "holds 3 images, a reference needs at least 20" in refusal("few.npz")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "is of 64 features, the network that judges has 12" in refusal("wide.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(WIDTH, np.nan), sigma=np.eye(WIDTH))
    assert "its statistics are not finite" in refusal("nan.npz")
    torch.save({"m": np.zeros(WIDTH), "s": np.eye(WIDTH)}, tmp_path / "whole.pth")
    assert read_statistics(tmp_path / "whole.pth") is not None
    for size in (0, 2, 100, 600):
        (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:size])
        assert "damaged, or no .npz or .pth of plain arrays" in refusal("cut.pth")
    torch.save({"m": Path("x"), "s": 1}, tmp_path / "unsafe.pth")
    assert "damaged, or no .npz or .pth of plain arrays" in refusal("unsafe.pth")


def test_images_of_another_size_than_the_references_are_refused(
    pipe: DistilledPipeline, real: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "large.npz", arr_0=real.repeat(2, 1).repeat(2, 2))
    np.savez(tmp_path / "small.npz", arr_0=real)
    judge = inspector("adm", tmp_path / "large.npz")
    assert judge.reference.size == (16, 16)
    with pytest.raises(ValueError, match="the reference's images are 16x16 pixels, those of tiny 8x8"):
        evaluate(pipe, {"1": pipe.plan(1)}, judge, model="tiny", num=NUM, show_progress=False)
    with pytest.raises(ValueError, match=r"those of .*small\.npz 8x8: bring one set to the other's size"):
        evaluate_images(ImageSet.open(tmp_path / "small.npz"), judge, num=NUM, show_progress=False)


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inception, "open", lambda source, **options: StandIn())


def judged(path: Path, *arguments: object, num: int = NUM) -> dict[str, Any]:
    assert run("eval", *arguments, "--inception", "weights.pth", "--num", num, "--json", path) == 0
    return json.loads(path.read_text())


def test_a_model_its_folder_and_its_arrays_are_judged_alike(
    model: Path, reference: Path, stand_in: None, tmp_path: Path, capsys: Capture
) -> None:
    how = ["--protocol", "adm", "--reference", reference, "--batch", 16]
    sampled = ["--num", NUM, "--seed", 3, "--batch", 16, "--out", tmp_path / "x", "--npz", tmp_path / "x.npz"]
    assert run("sample", model, *sampled) == 0
    ours = judged(tmp_path / "model.json", model, *how, "--steps", 1, "--seed", 3)
    folder = judged(tmp_path / "folder.json", tmp_path / "x", *how)
    arrays = judged(tmp_path / "npz.json", tmp_path / "x.npz", *how)
    capsys.readouterr()
    figures = [
        {k: v for k, v in r["rows"][0].items() if k not in ("plan", "network_evaluations")}
        for r in (ours, folder, arrays)
    ]
    assert figures[0] == figures[1] == figures[2]
    same = ("protocol", "model", "num", "seed", "labels", "rounding", "feature_hash", "reference_hash", "versions")
    assert all(ours[key] == folder[key] for key in same)
    assert (arrays["seed"], arrays["rounding"], arrays["labels"]) == (
        None, "as given, 8 bits", "as given, 10 of each of 4 classes",
    )  # fmt: skip
    assert run("compare", tmp_path / "model.json", tmp_path / "npz.json") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"protocol adm, n {NUM}") and out.count(f"{ours['rows'][0]['fid']:.4g}") == 2


def test_comparing_across_protocols_sizes_and_references_is_refused(
    model: Path, reference: Path, stand_in: None, tmp_path: Path, capsys: Capture
) -> None:
    def told(*names: str) -> str:
        return refused(capsys, "compare", *(tmp_path / f"{name}.json" for name in names))

    assert run("eval", model, "--steps", 1, "--num", NUM, "--json", tmp_path / "zoo.json") == 0
    other = tmp_path / "other.npz"
    np.savez(other, mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    judged(tmp_path / "adm.json", model, "--steps", 1, "--protocol", "adm", "--reference", reference)
    judged(tmp_path / "few.json", model, "--steps", 1, "--protocol", "adm", "--reference", reference, num=20)
    judged(tmp_path / "dd1.json", model, "--steps", 1, "--protocol", "dd1", "--reference", reference)
    judged(tmp_path / "real.json", model, "--steps", 1, "--protocol", "adm", "--reference", other)
    for names, message in {
        ("adm", "dd1"): "protocol is adm in",
        ("adm", "adm", "zoo"): "protocol is adm in",
        ("adm", "few"): "num is 40 in",
        ("adm", "real"): "reference_hash is",
    }.items():
        assert message in told(*names) and "cannot be compared" in told(*names)
    renamed = json.loads((tmp_path / "adm.json").read_text()) | {"feature_hash": "another"}
    (tmp_path / "network.json").write_text(json.dumps(renamed))
    assert "feature_hash is stand-in in" in told("adm", "network")
    (tmp_path / "junk.json").write_text("{}")
    assert "is no result of ddecode eval" in told("junk")
    for rows in ([], {}, [1], [{"fid": 1.0}], [renamed["rows"][0], {"plan": "1"}]):
        (tmp_path / "junk.json").write_text(json.dumps(renamed | {"rows": rows}))
        assert "is no result of ddecode eval" in told("junk")
    (tmp_path / "junk.json").write_text("{")
    assert "is damaged" in told("junk")
    assert "there is no file" in told("missing")


def test_eval_refuses_what_a_protocol_does_not_take(
    model: Path, reference: Path, stand_in: None, tmp_path: Path, capsys: Capture
) -> None:
    adm = ["--protocol", "adm", "--inception", "weights.pth", "--reference", reference]
    dd1 = ["--protocol", "dd1", *adm[2:]]
    assert run("sample", model, "--num", 24, "--out", tmp_path / "x") == 0
    for arguments, message in [
        ([model, *adm[:4]], "protocol adm needs --inception weights-inception-2015-12-05-6726825d.pth and --reference"),
        ([model, "--inception", "x"], "go with --protocol adm or dd1"),
        ([tmp_path / "x"], "protocol zoo judges models"),
        ([tmp_path / "x", *adm], "holds 24 images, not 50000: sample more, or give --num"),
        ([tmp_path / "x", *adm, "--num", 24, "--steps", 1], "--steps, --plan, --with and --seed go with models"),
        ([tmp_path / "x", *adm, "--num", 22], "must be a multiple of the 4 classes, got 22"),
        ([tmp_path / "x", *dd1, "--num", 24], "protocol dd1 takes uniform labels, "),
        ([model, *adm, "--num", 41], "must be a multiple of the 4 classes, got 41"),
        ([model, *adm[:5], tmp_path / "missing.npz", "--num", 40], "there is no reference"),
        ([tmp_path / "nothing.npz", *adm], "there is no file"),
    ]:
        assert message in refused(capsys, "eval", *arguments)


def test_a_missing_torch_fidelity_is_one_line(
    model: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    options = ["--protocol", "adm", "--inception", "weights.pth", "--reference", reference]
    assert "pip install torch-fidelity" in refused(capsys, "eval", model, *options)
