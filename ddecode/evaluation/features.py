"""The small convolutional feature network behind the `zoo` protocol and the zoo's perceptual losses.

B batch, H W image height and width, F width of the pooled features, K classes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.arguments import as_path, check_whole
from ddecode.checkpoint import loaders, save_tensors, zoo_folder
from ddecode.config import build
from ddecode.files import read_json, read_tensors, write_aside

FEATURE_SIZES = {"widths": tuple[int, ...], "blocks": int, "num_classes": int}
"""What the `config.json` of a `FeatureNetwork` holds, among other facts."""


@dataclass(frozen=True, kw_only=True)
class FeatureMaps:
    """What one pass of a `FeatureNetwork` gives."""

    stages: tuple[Tensor, ...]
    """One fp32 [B, C_i, H_i, W_i] per stage, after the activation."""
    pooled_BF: Tensor
    """Mean of the last stage over space."""
    logits_BK: Tensor

    def descriptors(self) -> Tensor:
        """One fp32 vector [B, F'] per image: every stage's means over quarters of the image, and `pooled_BF`."""
        quarters = [F.adaptive_avg_pool2d(stage.float(), 2).flatten(1) for stage in self.stages]
        return torch.cat([*quarters, self.pooled_BF], 1)


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.norm1(self.conv1(x)))
        return F.gelu(x + self.norm2(self.conv2(h)))


class FeatureNetwork(nn.Module):
    """Residual classifier whose pooled last stage is the feature space of the Fréchet distance.

    Args:
        widths: channels of each stage; every stage halves height and width.
        blocks: residual blocks per stage.
        num_classes: classes of the data set it is trained on.
    """

    def __init__(self, *, widths: tuple[int, ...] = (32, 64, 128), blocks: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        for size in (*widths, blocks, num_classes):
            check_whole("a size of a feature network", size, 1, 1 << 16)
        self.widths, self.blocks, self.num_classes = tuple(widths), blocks, num_classes
        stages, before = [], 3
        for width in widths:
            stages.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 4, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    *[ResidualBlock(width) for _ in range(blocks)],
                )
            )
            before = width
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(before, num_classes)

    @property
    def descriptor_width(self) -> int:
        """F' of `FeatureMaps.descriptors`."""
        return 4 * sum(self.widths) + self.widths[-1]

    def forward(self, images_B3HW: Tensor) -> FeatureMaps:
        """images_B3HW: fp32 in [-1, 1]."""
        stages, h = [], images_B3HW
        for stage in self.stages:
            h = stage(h)
            stages.append(h)
        pooled_BF = h.float().mean((2, 3))
        return FeatureMaps(stages=tuple(stages), pooled_BF=pooled_BF, logits_BK=self.head(pooled_BF))


def perceptual_gap(ours: FeatureMaps, theirs: FeatureMaps) -> Tensor:
    """LPIPS with unit weights (Zhang et al. 2018, eq. 1), fp32 [B]: squared distance of channel-normalised maps."""
    distance_B = torch.zeros(len(ours.pooled_BF), device=ours.pooled_BF.device)
    for a, b in zip(ours.stages, theirs.stages, strict=True):
        gap = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)
        distance_B = distance_B + gap.square().sum(1).mean((1, 2))
    return distance_B


def perceptual_distance(network: FeatureNetwork, images_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """`perceptual_gap` of two batches of images, fp32 [B,3,H,W] in [-1,1]; gradients flow into the first only."""
    with torch.no_grad():
        theirs = network(target_B3HW)
    return perceptual_gap(network(images_B3HW), theirs)


def features_folder(name: str) -> Path:
    """A bundled feature network's folder, or the folder named."""
    bundled = zoo_folder() / "features" / name
    return bundled if bundled.is_dir() else Path(name)


def save_features(folder: str | Path, network: FeatureNetwork, **facts: object) -> None:
    """Write what `load_features` reads, in half precision, and facts for people."""
    folder = as_path("a folder of features", folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_tensors(folder / "model.safetensors", state)
    sizes = {"widths": network.widths, "blocks": network.blocks, "num_classes": network.num_classes}
    write_aside(folder / "config.json", (json.dumps(sizes | facts, indent=2) + "\n").encode())


def load_features(folder: str | Path) -> FeatureNetwork:
    """A frozen feature network from `config.json` and `model.safetensors`, in evaluation mode, fp32.

    Raises:
        ValueError: the folder holds none, or it is damaged.
    """
    folder = as_path("a folder of features", folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no feature network in {folder}")
    config = read_json(path)
    if not isinstance(config, dict) or not FEATURE_SIZES.keys() <= config.keys():
        raise ValueError(f"{path} is of no feature network: it lacks one of {', '.join(FEATURE_SIZES)}")
    sizes = {name: build(kind, config[name], name) for name, kind in FEATURE_SIZES.items()}
    state = read_tensors(folder / "model.safetensors")
    built: FeatureNetwork = loaders().state.built(lambda: FeatureNetwork(**sizes), state, "network of its config")
    return built.requires_grad_(False)
