"""What callers hand to the public functions, checked where it comes in; the loops behind them take it as it is.

B batch, L token positions, V codes, C code width, H W image height and width.
"""

import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddecode.types import Labels

MOST = 2**31 - 1
"""Of counts and sizes: what is larger was not meant, and overflows somewhere."""
LARGEST_SIZES = {"depth": 1000, "tokens": 1 << 16, "patch_nums": 256, "res_blocks": 64, "channel_mult": 64}
"""Of what takes memory or time before a single weight is read; of other sizes a million."""
LARGEST_SEED = 2**63 - 1
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Of labels and positions."""
LARGEST_FLOAT = sys.float_info.max


class Brief(reprlib.Repr):
    """`repr` cut short."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """What somebody gave, short enough for a line."""
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{place}"
    if isinstance(value, np.ndarray):
        return f"numpy array {value.dtype} {list(value.shape)}"
    return Brief().repr(value) if isinstance(value, str | int | float | list | tuple | dict) else type(value).__name__


def check_kind(name: str, value: Any, *kinds: type) -> None:
    """
    Raises:
        ValueError: it is none of these kinds.
    """
    if not isinstance(value, kinds):
        known = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {known}, got {shown(value)}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """
    Raises:
        ValueError: it is none of these words.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def as_path(name: str, value: Any) -> Path:
    """A path, which people give as text as well.

    Raises:
        ValueError: it is neither.
    """
    check_kind(name, value, str, Path)
    return Path(value)


def check_whole(name: str, value: Any, lowest: int, highest: int = MOST) -> None:
    """
    Raises:
        ValueError: it is no whole number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {shown(value)}")
    if value > highest:
        raise ValueError(f"{name} must be at most {highest}, got {shown(value)}")


def check_finite(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: it is no number, infinite or not a number.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST_FLOAT:
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")


def check_logits(logits: Tensor) -> Tensor:
    """What a network says of tokens, as it is: a token would be chosen from anything.

    Raises:
        ValueError: it is not finite.
    """
    if not logits.amax(-1).sum().isfinite():
        raise ValueError("the network's logits are not finite: its weights are damaged, or its precision overflows")
    return logits


def check_sizes(config: Any) -> None:
    """Whether the sizes of a network, a dataclass of ints and tuples of them, are ones that somebody would build.

    Raises:
        ValueError: one is not positive, or so large that it was not meant.
    """
    for name, value in vars(config).items():
        largest = LARGEST_SIZES.get(name, 1 << 20)
        if isinstance(value, tuple | list):
            if not 1 <= len(value) <= 64:
                raise ValueError(f"{name} must be positive numbers, 1 to 64 of them, got {shown(value)}")
            for part in value:
                check_whole(f"each of {name}", part, 1, largest)
        elif value is not None and not isinstance(value, bool):
            check_whole(name, value, 0 if name == "num_classes" else 1, largest)


def check_vectors(name: str, vectors: Any, length: int, width: int) -> None:
    """
    Raises:
        ValueError: it is no floating tensor [B, length, width], or not all of it is finite.
    """
    fits = isinstance(vectors, Tensor) and vectors.is_floating_point() and vectors.dim() == 3
    if not fits or tuple(vectors.shape[1:]) != (length, width) or not len(vectors) or vectors.is_meta:
        raise ValueError(f"{name} must be [B, {length}, {width}], floating, got {shown(vectors)}")
    if not vectors.isfinite().all():
        raise ValueError(f"{name} must be finite, and holds NaN or infinity")


def check_ids(ids_BL: Any, vocab_size: int, length: int | None = None) -> None:
    """
    Raises:
        ValueError: it is no integer tensor [B, L] of codes; `length` None takes any L.
    """
    fits = isinstance(ids_BL, Tensor) and ids_BL.dtype in (torch.int32, torch.int64) and ids_BL.dim() == 2
    if not fits or length not in (None, ids_BL.shape[1]) or ids_BL.is_meta:
        raise ValueError(f"ids must be int64 [B, {length or 'L'}], got {shown(ids_BL)}")
    if ids_BL.numel() and not (int(ids_BL.min()) >= 0 and int(ids_BL.max()) < vocab_size):
        raise ValueError(f"ids must lie in 0..{vocab_size - 1}, got {int(ids_BL.min())}..{int(ids_BL.max())}")


def check_images(images_B3HW: Any, multiple: int, *, finite: bool = True) -> None:
    """
    Raises:
        ValueError: it is no floating tensor [B, 3, H, W] with sides that `multiple` divides, or not `finite`.
    """
    fits = isinstance(images_B3HW, Tensor) and images_B3HW.is_floating_point() and images_B3HW.dim() == 4
    if not fits or images_B3HW.shape[1] != 3 or images_B3HW.is_meta:
        raise ValueError(f"images must be floats [B, 3, H, W] in [-1, 1], got {shown(images_B3HW)}")
    if any(side < 1 or side % multiple for side in images_B3HW.shape[2:]):
        raise ValueError(f"sides of images must be multiples of {multiple}, got {list(images_B3HW.shape[2:])}")
    if finite and not images_B3HW.isfinite().all():
        raise ValueError("images must be finite, and hold NaN or infinity")


def check_pictures(images_NHW3: Any) -> None:
    """
    Raises:
        ValueError: it is no uint8 array [N, H, W, 3], or empty.
    """
    fits = isinstance(images_NHW3, np.ndarray) and images_NHW3.dtype == np.uint8 and images_NHW3.ndim == 4
    if not fits or images_NHW3.shape[3] != 3 or not images_NHW3.size:
        raise ValueError(f"images must be a numpy array uint8 [N, H, W, 3], got {shown(images_NHW3)}")


def check_labels(class_labels: Labels, batch: int | None, num_classes: int, device: torch.device) -> Any:
    """Class labels as int64 [B] on `device`, or captions; see `check_captions`.

    Args:
        class_labels: int (one sample, or repeated to `batch`), sequence of ints, or integer tensor [B].
        batch: expected B; None takes what is given.

    Raises:
        ValueError: out of 0..num_classes (the last is unconditional), not integers, or another batch size.
    """
    if isinstance(class_labels, tuple) and any(isinstance(part, Tensor) for part in class_labels):
        return check_captions(class_labels, batch, device)
    if isinstance(class_labels, int | np.integer):
        class_labels = [int(class_labels) if isinstance(class_labels, np.integer) else class_labels] * (batch or 1)
    if isinstance(class_labels, Tensor):
        labels = class_labels
    else:
        for label in class_labels if isinstance(class_labels, Sequence) else [class_labels]:
            check_whole("a class label", label, -MOST)
        labels = torch.tensor(list(class_labels))
    if labels.dim() == 0:
        labels = labels.expand(batch or 1)
    if labels.dtype not in INTEGERS or labels.dim() != 1 or not len(labels) or labels.is_meta:
        given = shown(class_labels)
        raise ValueError(f"class labels must be an int, a list of ints or an integer tensor [B], got {given}")
    if int(labels.min()) < 0 or int(labels.max()) > num_classes:
        wrong = next(int(v) for v in labels if not 0 <= int(v) <= num_classes)
        raise ValueError(f"class {wrong} is out of range: this model knows 0..{num_classes - 1}")
    if batch is not None and len(labels) != batch:
        raise ValueError(f"{len(labels)} class labels for a batch of {batch}")
    return labels.to(device=device, dtype=torch.int64)


def check_captions(captions: Any, batch: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Captions on `device`, features fp32 [B,P,E] and mask [B,P]; the model they condition knows P and E.

    Args:
        captions: floating features and a mask of 0 and 1, of any dtype.
        batch: expected B; None takes what is given.

    Raises:
        ValueError: they are of another kind, empty or not finite, or of another batch size.
    """
    floats = [isinstance(part, Tensor) and part.is_floating_point() and not part.is_meta for part in captions[:1]]
    masks = [isinstance(part, Tensor) and not part.is_complex() and not part.is_meta for part in captions[1:]]
    if floats != [True] or masks != [True] or captions[0].dim() != 3 or captions[1].shape != captions[0].shape[:2]:
        given = ", ".join(map(shown, captions))
        raise ValueError(f"captions must be (features, mask), floats [B, P, E] and [B, P], got ({given})")
    features_BPE, mask_BP = captions
    if not len(features_BPE) or not features_BPE.isfinite().all():
        raise ValueError(f"features of captions must be finite, and one at least, got {shown(features_BPE)}")
    if not ((mask_BP == 0) | (mask_BP == 1)).all():
        raise ValueError("masks of captions must be 1 for a token and 0 elsewhere, and hold other numbers")
    if batch is not None and len(features_BPE) != batch:
        raise ValueError(f"{len(features_BPE)} captions for a batch of {batch}")
    return features_BPE.to(device=device, dtype=torch.float32), mask_BP.to(device)


def check_above(name: str, value: float) -> None:
    """Raises ValueError: it is not finite or not above 0."""
    check_finite(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
