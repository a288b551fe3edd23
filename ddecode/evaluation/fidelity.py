"""What torch-fidelity does for the protocols `adm` and `dd1`: the Inception network and the metrics on its features.

torch-fidelity is the extra `fidelity`; it is imported when something here is called, since it needs torchvision.

N samples, B of a batch, H W image height and width, F feature width, K classes.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.arguments import shown
from ddecode.checkpoint import loaders
from ddecode.files import file_hash

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""The file that torch-fidelity ships (its release v0.2.0), pytorch-fid too under another name; it ends on its hash."""
RESOLUTION = 299
LEAST = 20
"""Images that the metrics need of either set: two to a part, and more than neighbours."""
PARTS = 10
"""Of a set, to tell the error of a score."""
SUBSET = 1000
"""Images of a kernel distance's subset."""
SUBSETS = 100
NEIGHBOURS = 3

Resize = Literal["tensorflow", "torch"]


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What a network sees in a batch."""

    features_BF: Tensor
    """fp32; of Fréchet and kernel distance, precision and recall."""
    logits_BK: Tensor
    """fp32; of the Inception score."""


class Extractor(Protocol):
    """A network that judges images."""

    hash: str
    """Tells it from others."""

    def __call__(self, images_B3HW: Tensor) -> Extracted:
        """images_B3HW: uint8, on any device."""
        ...


class Inception:
    """torch-fidelity's InceptionV3, the network of the original FID.

    Args:
        network: torch-fidelity's feature extractor, giving its features `2048` and `logits_unbiased`.
        resize: how images come to 299 pixels: as TensorFlow 1 does, where ADM's evaluator runs, or as torch does, which
            pytorch-fid relies on. The second also differs in a shift of half a grey level.
        hash: of the file of its weights.
    """

    def __init__(self, network: nn.Module, *, resize: Resize, hash: str) -> None:
        self.network, self.resize, self.hash = network, resize, hash

    @classmethod
    def open(cls, source: str, *, resize: Resize, device: torch.device | str = "cpu") -> "Inception":
        """
        Args:
            source: a file of weights, or a hub id: `owner/name` or `owner/name/file`. Read without running code.
            resize, device: see above.

        Raises:
            ValueError: torch-fidelity is missing, or the weights are, or they are of another network.
        """
        kind = library().FeatureExtractorInceptionV3
        reader = loaders().state
        path = Path(source)
        if not path.exists() and reader.is_hub_id(source):
            path = reader.download(source)
        stream = io.BytesIO()
        torch.save(reader.read_file(path), stream)
        stream.seek(0)
        try:
            network = kind("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=stream)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{source} is not torch-fidelity's {INCEPTION}: {reason}") from None
        return cls(network.to(device), resize=resize, hash=file_hash(path))

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> Extracted:
        head = self.network.get_submodule("fc").get_parameter("weight")
        images_B3HW = images_B3HW.to(head.device)
        if self.resize == "tensorflow":
            features_BF, logits_BK = self.network(images_B3HW)
        else:
            size = (RESOLUTION, RESOLUTION)
            x = 2 * F.interpolate(images_B3HW.float() / 255, size, mode="bilinear", align_corners=False) - 1
            for name, layer in self.network.named_children():
                if name != "fc":
                    x = layer(x)
            features_BF, logits_BK = x.flatten(1), x.flatten(1) @ head.T
        return Extracted(features_BF=features_BF, logits_BK=logits_BK)


def library() -> ModuleType:
    """torch-fidelity.

    Raises:
        ValueError: it is not installed, or does not run here.
    """
    try:
        import torch_fidelity
    except ImportError as error:
        raise ValueError(f"this protocol needs the extra fidelity ({error}): pip install torch-fidelity") from None
    except RuntimeError as error:
        fit = f"install the torchvision that belongs to torch {torch.__version__}"
        raise ValueError(f"torch-fidelity does not run here: {fit} ({error})") from None
    return torch_fidelity


@dataclass(frozen=True, kw_only=True)
class Estimate:
    mean: float
    error: float
    """Standard error of the mean."""


def inception_score(logits_NK: Tensor) -> Estimate:
    """Inception score (Salimans et al. 2016) in 10 random parts.

    At N = 50 000 a part has 5000 images, as in ADM's evaluator.

    Raises:
        ValueError: there are fewer than 20 images, or torch-fidelity does not run here.
    """
    library()
    check_enough(logits_NK)
    from torch_fidelity import metric_isc

    found = metric_isc.isc_features_to_metric(logits_NK, splits=PARTS)
    mean, deviation = (found[key] for key in (metric_isc.KEY_METRIC_ISC_MEAN, metric_isc.KEY_METRIC_ISC_STD))
    return Estimate(mean=mean, error=deviation / (PARTS - 1) ** 0.5)  # of a deviation that divides by PARTS


def kernel_distance(features_NF: Tensor, real_NF: Tensor) -> Estimate:
    """Kernel Inception distance (Binkowski et al. 2018), mean over 100 random subsets of 1000 images.

    Random subsets share images, so their spread says too little of the error. That comes from disjoint parts of both
    sets, ten of them or, of 10 000 images and more, as many as have 1000 images: their deviation over the root of their
    number.

    Raises:
        ValueError: see `inception_score`.
    """
    library()
    check_enough(features_NF, real_NF)
    from torch_fidelity import metric_kid

    fewer = min(len(features_NF), len(real_NF))
    found = metric_kid.kid_features_to_metric(
        features_NF, real_NF, kid_subsets=SUBSETS, kid_subset_size=min(SUBSET, fewer), verbose=False
    )
    part = min(SUBSET, fewer // PARTS)
    ours, theirs = (shuffled(x)[: fewer // part * part].reshape(-1, part, x.shape[1]) for x in (features_NF, real_NF))
    parts = [metric_kid.kernel_mmd(a, b) for a, b in zip(ours.numpy(), theirs.numpy(), strict=True)]
    error = float(np.std(parts, ddof=1) / len(parts) ** 0.5)
    return Estimate(mean=found[metric_kid.KEY_METRIC_KID_MEAN], error=error)


def check_enough(*sets: Tensor) -> None:
    """Raises ValueError: a set has fewer images than the metrics need, or no finite numbers of one width for each."""
    for x in sets:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2 or not x.isfinite().all():
            raise ValueError(f"features must be a finite float tensor [N, F], got {shown(x)}")
    if len(widths := {x.shape[1] for x in sets}) > 1:
        raise ValueError(f"features must be of one width, got {sorted(widths)}")
    if (fewest := min(map(len, sets))) < LEAST:
        raise ValueError(f"these metrics need at least {LEAST} images, got {fewest}")


def shuffled(x_NF: Tensor) -> Tensor:
    return x_NF[torch.from_numpy(np.random.default_rng(0).permutation(len(x_NF)))]


def precision_recall(features_NF: Tensor, real_NF: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) with 3 neighbours.

    ADM's evaluator computes the same, its distances in half precision.

    Raises:
        ValueError: see `inception_score`.
    """
    library()
    check_enough(features_NF, real_NF)
    from torch_fidelity import metric_prc

    found = metric_prc.prc_features_to_metric(
        features_NF, real_NF, prc_neighborhood=NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]
