"""Networks of image features: the small convolutional one behind the `zoo` protocol and the zoo's perceptual losses,
and what it has in common with others that image terms may see through.

B batch, H W image height and width, F width of the pooled features, K classes, C channels of a stage.
"""

import json
from abc import ABC, abstractmethod
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
    """What one pass of a network gives."""

    stages: tuple[Tensor, ...]
    """One fp32 [B, C_i, H_i, W_i] per stage, after the activation."""
    pooled_BF: Tensor
    """Mean of the last stage over space."""
    logits_BK: Tensor
    """K may be 0."""
    weights: tuple[Tensor, ...] | None = None
    """Of each stage's channels in `perceptual_gap`, fp32 [C_i]; None is 1 for all."""

    def descriptors(self) -> Tensor:
        """One fp32 vector [B, F'] per image: every stage's means over quarters of the image, and `pooled_BF`."""
        quarters = [F.adaptive_avg_pool2d(stage.float(), 2).flatten(1) for stage in self.stages]
        return torch.cat([*quarters, self.pooled_BF], 1)


class Features(nn.Module, ABC):
    """A network that image terms see through.

    Args:
        widths: channels of each stage.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = tuple(widths)

    @property
    def descriptor_width(self) -> int:
        """F' of `FeatureMaps.descriptors`."""
        return 4 * sum(self.widths) + self.widths[-1]

    @abstractmethod
    def forward(self, images_B3HW: Tensor) -> FeatureMaps:
        """images_B3HW: fp32 in [-1, 1]."""


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


class FeatureNetwork(Features):
    """Residual classifier whose pooled last stage is the feature space of the Fréchet distance.

    Args:
        widths: channels of each stage; every stage halves height and width.
        blocks: residual blocks per stage.
        num_classes: classes of the data set it is trained on.
    """

    def __init__(self, *, widths: tuple[int, ...] = (32, 64, 128), blocks: int = 1, num_classes: int = 10) -> None:
        super().__init__(widths)
        for size in (*widths, blocks, num_classes):
            check_whole("a size of a feature network", size, 1, 1 << 16)
        self.blocks, self.num_classes = blocks, num_classes
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

    def forward(self, images_B3HW: Tensor) -> FeatureMaps:
        """See `Features.forward`."""
        stages, h = [], images_B3HW
        for stage in self.stages:
            h = stage(h)
            stages.append(h)
        pooled_BF = h.float().mean((2, 3))
        return FeatureMaps(stages=tuple(stages), pooled_BF=pooled_BF, logits_BK=self.head(pooled_BF))


def perceptual_gap(ours: FeatureMaps, theirs: FeatureMaps) -> Tensor:
    """LPIPS (Zhang et al. 2018, eq. 1) with the network's weights of channels, fp32 [B]: squared distance of
    channel-normalised maps."""
    distance_B = torch.zeros(len(ours.pooled_BF), device=ours.pooled_BF.device)
    for i, (a, b) in enumerate(zip(ours.stages, theirs.stages, strict=True)):
        square = (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square()
        if ours.weights is not None:
            square = square * ours.weights[i][:, None, None]
        distance_B = distance_B + square.sum(1).mean((1, 2))
    return distance_B


def perceptual_distance(network: Features, images_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
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


def load_image_features(folder: str | Path) -> Features:
    """The network of image terms in a folder: a feature network of ours, or LPIPS in the two files of its authors and
    of torchvision (`third_party_loaders.lpips`).

    Raises:
        ValueError: the folder holds neither, or it is damaged.
    """
    folder = as_path("a folder of features", folder)
    if (folder / "config.json").is_file():
        return load_features(folder)
    found: Features | None = loaders().lpips.find_lpips(folder)
    if found is None:
        raise ValueError(
            f"no feature network in {folder}: neither one with a config.json, as ddecode train makes, nor LPIPS in its "
            "two files, torchvision's vgg16-397923af.pth and the heads vgg.pth"
        )
    return found
