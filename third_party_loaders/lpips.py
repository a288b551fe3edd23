"""LPIPS of VGG16 (Zhang et al. 2018, arXiv 1801.03924) as a network of image terms: torchvision's convolutions and the
heads that the authors published, by their own names.

B batch, H W image height and width, F width of the last stage, K classes, of which it knows none.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.evaluation.features import FeatureMaps, Features
from third_party_loaders.state import SUFFIXES, StateOrPath, built, read_state

CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Torchvision's numbers of each stage's."""
WIDTHS = (64, 128, 256, 512, 512)
SMALLEST = 2 ** (len(WIDTHS) - 1)
"""Pixels that leave one to the last stage."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of red, green and blue in [-1, 1]."""


class LPIPS(Features):
    """`perceptual_gap` of its maps is LPIPS. It says nothing of classes."""

    def __init__(self) -> None:
        super().__init__(WIDTHS)
        layers, before = {}, 3
        for numbers, width in zip(CONVOLUTIONS, WIDTHS, strict=True):
            for number in numbers:
                layers[str(number)] = nn.Conv2d(before, width, 3, padding=1)
                before = width
        self.features = nn.ModuleDict(layers)
        self.heads = nn.ParameterList(torch.ones(width) for width in WIDTHS)

    def forward(self, images_B3HW: Tensor) -> FeatureMaps:
        """images_B3HW: fp32 in [-1, 1].

        Raises:
            ValueError: they are smaller than 16 pixels.
        """
        if min(images_B3HW.shape[2:]) < SMALLEST:
            raise ValueError(f"LPIPS needs images of at least {SMALLEST} pixels, got {tuple(images_B3HW.shape[2:])}")
        shift_311, scale_311 = (images_B3HW.new_tensor(numbers)[:, None, None] for numbers in (SHIFT, SCALE))
        stages, h = [], (images_B3HW - shift_311) / scale_311
        for stage, numbers in enumerate(CONVOLUTIONS):
            h = F.max_pool2d(h, 2) if stage else h
            for number in numbers:
                h = F.relu(self.features[str(number)](h))
            stages.append(h)
        pooled_BF = h.float().mean((2, 3))
        return FeatureMaps(
            stages=tuple(stages), pooled_BF=pooled_BF, logits_BK=pooled_BF[:, :0], weights=tuple(self.heads)
        )


def load_lpips(network: StateOrPath, heads: StateOrPath) -> LPIPS:
    """LPIPS, frozen, in evaluation mode, fp32, on the CPU.

    Args:
        network: torchvision's VGG16, such as `vgg16-397923af.pth`; its classifier is not read.
        heads: the published linear heads of `vgg`, version 0.1 (`vgg.pth`).

    Raises:
        ValueError: keys are missing, extra or misshapen.
    """
    own = {name: tensor for name, tensor in read_state(network).items() if not name.startswith("classifier.")}
    for name, tensor in read_state(heads).items():
        stage = name.removeprefix("lin").removesuffix(".model.1.weight")
        own[f"heads.{stage}" if stage.isdecimal() else name] = tensor.flatten()
    state = {name: tensor.float() for name, tensor in own.items()}
    return built(LPIPS, state, "LPIPS of VGG16").requires_grad_(False)


def find_lpips(folder: Path) -> LPIPS | None:
    """LPIPS of a folder that holds its two files, told by what is in them; None where one is missing.

    Raises:
        ValueError: a file is damaged, or see `load_lpips`.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder.is_dir() else []
    states: list[Mapping[str, Tensor]] = [read_state(path) for path in files]
    networks = [state for state in states if "features.0.weight" in state]
    heads = [state for state in states if "lin0.model.1.weight" in state]
    return load_lpips(networks[0], heads[0]) if networks and heads else None
