"""LPIPS: equal to torchmetrics' on random convolutions and the published heads, and part of a distillation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Capture, refused, run
from tiny import seeded, write_yaml
from torch import Tensor

from ddecode.evaluation.features import features_folder, load_image_features, perceptual_distance
from third_party_loaders import load_lpips
from third_party_loaders.lpips import LPIPS, WIDTHS

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def theirs(torchvision_loads: None) -> Any:
    from torchmetrics.functional.image import lpips

    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = Path(lpips.__file__).parent / "lpips_models" / "vgg.pth"
        return lpips._LPIPS(pretrained=True, net="vgg", pnet_rand=True, model_path=str(heads)).eval()


@pytest.fixture(scope="module")
def states(theirs: Any) -> tuple[State, State]:
    """Torchvision's VGG16, with a part of its classifier, and the heads."""
    convolutions = {f"features.{name.split('.', 1)[1]}": t for name, t in theirs.net.state_dict().items()}
    heads = {name: t for name, t in theirs.state_dict().items() if name.startswith("lin") and "lins" not in name}
    return convolutions | {"classifier.0.bias": torch.zeros(4096)}, heads


@pytest.fixture(scope="module")
def folder(states: tuple[State, State], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files as they are downloaded."""
    folder = tmp_path_factory.mktemp("lpips")
    for name, state in zip(("vgg16-397923af.pth", "vgg.pth"), states, strict=True):
        torch.save(state, folder / name)
    return folder


def images(seed: int, side: int = 32) -> Tensor:
    return torch.rand(3, 3, side, side, generator=seeded(seed)) * 2 - 1


def test_the_distance_is_torchmetrics(theirs: Any, folder: Path) -> None:
    network = load_image_features(folder)
    assert isinstance(network, LPIPS) and not network.training
    assert not any(p.requires_grad for p in network.parameters())
    ours, target = images(0).requires_grad_(), images(1)
    distance_B = perceptual_distance(network, ours, target)
    expected_B = theirs(ours, target).flatten()
    torch.testing.assert_close(distance_B, expected_B, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(d_B.sum(), ours)[0] for d_B in (distance_B, expected_B)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    maps = network(target)
    assert tuple(stage.shape[1] for stage in maps.stages) == network.widths == WIDTHS and maps.logits_BK.numel() == 0
    assert maps.descriptors().shape == (3, network.descriptor_width)


def test_what_is_missing_or_damaged_is_named(states: tuple[State, State], folder: Path, tmp_path: Path) -> None:
    network, heads = states
    with pytest.raises(ValueError, match=r"missing features\.28\.bias"):
        load_lpips({name: t for name, t in network.items() if name != "features.28.bias"}, heads)
    with pytest.raises(ValueError, match=r"misshapen heads\.1 is \(3,\), expected \(128,\)"):
        load_lpips(network, heads | {"lin1.model.1.weight": torch.ones(1, 3, 1, 1)})
    with pytest.raises(ValueError, match=r"unknown features\.30\.weight"):
        load_lpips(network | {"features.30.weight": torch.ones(1)}, heads)
    (tmp_path / "vgg16.pth").symlink_to(folder / "vgg16-397923af.pth")
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"neither one with a config\.json, .* nor LPIPS in its two files"):
            load_image_features(where)
    assert load_image_features(features_folder("fashion-perceptual")).widths


def test_all_image_terms_may_see_through_it(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = {
        "teacher": "fashion-llamagen",
        "pairs": {"num": 4, "num_steps": 4},
        "student": {"starts": [0], "depth": 1},
        "objective": {
            "perceptual": 0.5, "energy": 1.0, "adversarial": {"weight": 0.5, "width": 4}, "image_batch": 2,
            "features": str(folder),
        },
        "training": {"steps": 1, "batch": 2, "lr": 1.0e-3},
    }  # fmt: skip
    config = ("--config", write_yaml(tmp_path / "recipe.yaml", recipe))
    assert run("pairs", *config, "--out", tmp_path / "pairs") == 0
    assert run("distill", *config, "--pairs", tmp_path / "pairs", "--out", tmp_path / "run") == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"perceptual", "energy", "verdict_student"} <= row.keys() and row["perceptual"] > 0
    missing = ("objective.features=nowhere",)
    assert "no feature network in nowhere" in refused(
        capsys, "distill", *config, "--pairs", tmp_path / "pairs", "--out", tmp_path / "other", *missing
    )
    with pytest.raises(ValueError, match=r"at least 16 pixels, got \(8, 8\)"):
        load_image_features(folder)(images(0, 8))
