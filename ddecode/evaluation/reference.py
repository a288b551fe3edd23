"""What a network sees in sets of images, sampled or real.

N images of a set, B of a batch, H W image height and width, F feature width, K classes of the network.
"""

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddecode.arguments import as_path
from ddecode.checkpoint import loaders
from ddecode.evaluation.blocks import Block, counted, progress_bar
from ddecode.evaluation.fidelity import LEAST, Extractor
from ddecode.evaluation.metrics import Gaussian, RunningMoments
from ddecode.files import file_hash
from ddecode.images import ImageSet
from ddecode.processes import in_turn


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A set of images, as a network sees it."""

    gaussian: Gaussian
    logits_NK: Tensor
    """fp32."""
    features_NF: Tensor | None
    """fp32; None where they were not kept."""


def see(extractor: Extractor, images_BHW3: np.ndarray) -> Block:
    """`features` [B,F] and `logits` [B,K] of a batch, fp32, from uint8."""
    seen = extractor(torch.from_numpy(images_BHW3).permute(0, 3, 1, 2))
    return {"features": seen.features_BF.float().cpu().numpy(), "logits": seen.logits_BK.float().cpu().numpy()}


def look(blocks: Iterable[Block], *, keep_features: bool) -> Seen:
    """A set from what `see` makes of its batches."""
    moments, features, logits = RunningMoments(), [], []
    for block in blocks:
        moments.add(block["features"])
        logits.append(torch.from_numpy(block["logits"]))
        if keep_features:
            features.append(torch.from_numpy(block["features"]))
    return Seen(
        gaussian=moments.gaussian(),
        logits_NK=torch.cat(logits),
        features_NF=torch.cat(features) if keep_features else None,
    )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The real images that a protocol judges by."""

    real: Gaussian
    features_NF: Tensor | None
    """fp32; None where only statistics are known."""
    hash: str
    size: tuple[int, int] | None
    """Height and width of the images; None where only statistics are known."""

    def check_size(self, name: str, images_BHW3: np.ndarray) -> None:
        """
        Raises:
            ValueError: the images are of another size: scaled to the network's, one set would be blurred more.
        """
        size = images_BHW3.shape[1:3]
        if self.size not in (None, size):
            theirs, ours = (f"{w}x{h}" for h, w in (self.size, size))
            raise ValueError(
                f"the reference's images are {theirs} pixels, those of {name} {ours}: bring one set to the other's "
                "size (docs/evaluation.md)"
            )

    @classmethod
    def open(
        cls, path: str | Path, extractor: Extractor, *, batch: int = 50, show_progress: bool = True
    ) -> "Reference":
        """
        Args:
            path: an `.npz` with statistics `mu` and `sigma`, with images `arr_0`, or with both, as guided-diffusion and
                pytorch-fid write them; DD1's `statistic.pth`, with `m` and `s`; or a folder of PNGs.
            extractor: sees the images; statistics have to be of its features.

        Raises:
            ValueError: there is nothing of the kind, it is of other features, or the images are too few.
        """
        path = as_path("a reference", path)
        if not path.exists():
            raise ValueError(f"there is no reference {path}")
        real, features_NF, size = None if path.is_dir() else read_statistics(path), None, None
        width = extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).features_BF.shape[1]
        if real is not None and (real.mean_F.shape, real.covariance_FF.shape) != ((width,), (width, width)):
            raise ValueError(f"{path} is of {real.mean_F.size} features, the network that judges has {width}")
        if real is not None and not (np.isfinite(real.mean_F).all() and np.isfinite(real.covariance_FF).all()):
            raise ValueError(f"{path} is damaged: its statistics are not finite")
        if path.is_dir() or holds_images(path):
            images = ImageSet.open(path)
            if images.num < LEAST:
                raise ValueError(f"{path} holds {images.num} images, a reference needs at least {LEAST}")
            size = next(images.batches(1, 1)).shape[1:3]
            with progress_bar(images.num, show_progress, "real") as bar:
                blocks = in_turn(partial(see, extractor), images.batches(images.num, batch))
                seen = look(counted(blocks, bar), keep_features=True)
            real, features_NF = real or seen.gaussian, seen.features_NF
        if real is None:
            raise ValueError(f"{path} holds neither statistics (mu and sigma) nor images (arr_0)")
        return cls(real=real, features_NF=features_NF, hash=file_hash(path), size=size)


def holds_images(path: Path) -> bool:
    return path.suffix == ".npz" and "arr_0.npy" in zipfile.ZipFile(path).namelist()


def read_statistics(path: Path) -> Gaussian | None:
    """Mean and covariance from an `.npz` or, without running code, a `.pth`; None if they are not there.

    Raises:
        ValueError: the file is damaged or of another kind, or asks for more than arrays.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                arrays = {name: file[name] for name in ("mu", "sigma") if name in file.files}
        else:
            loaders().state.check_growth(path)
            with torch.serialization.safe_globals(array_globals()):
                arrays = torch.load(path, map_location="cpu", weights_only=True)
        for mean, covariance in (("mu", "sigma"), ("m", "s")):
            if {mean, covariance} <= arrays.keys():
                mean_F, covariance_FF = (np.asarray(arrays[name], np.float64) for name in (mean, covariance))
                return Gaussian(mean_F=mean_F, covariance_FF=covariance_FF)
    except OSError:
        raise
    except Exception:  # of many kinds, for a damaged or an unsafe file
        raise ValueError(f"{path} is damaged, or no .npz or .pth of plain arrays") from None
    return None


def array_globals() -> list[Any]:
    """What a pickled array asks for, under the names that numpy 1 and 2 have for it."""
    reconstruct = np.empty(0).__reduce__()[0]
    names = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64)), *names]
