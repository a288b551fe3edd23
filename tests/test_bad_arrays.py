"""Wrong captions, images, pairs and noise, given from Python: a `ValueError` of one line, and nothing written.

B batch, L token positions, V codes.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from refusal import check
from tiny import L, V, seeded
from torch import Tensor

from ddecode import DistilledPipeline
from ddecode.arguments import check_labels
from ddecode.config import PairsConfig
from ddecode.evaluation.results import compare
from ddecode.flow import flow_grid, tokens_to_noise
from ddecode.images import to_uint8, write_npz
from ddecode.pairs import Pairs, make_manifest, write_pairs
from ddecode.training import train
from ddecode.training_config import TrainingConfig

NAN = math.nan
PICTURES = np.zeros((2, 8, 8, 3), np.uint8)
IDS = torch.zeros(2, L, dtype=torch.int64)
LOG_PROBS = torch.zeros(2, L, V)


def test_captions_are_finite_features_with_a_mask() -> None:
    features, mask = torch.zeros(2, 3, 4), torch.ones(2, 3)

    def captioned(value: Any) -> Any:
        return check_labels(value, 2, 0, torch.device("cpu"))

    check([
        (captioned, ((features,), (features, None), (mask, mask), (features, mask[:, :2])), "captions must be "),
        (captioned, ((features * NAN, mask), (features[:0], mask[:0])), "features of captions must be finite"),
        (captioned, ((features, mask * 2), (features, mask * NAN)), "masks of captions must be 1 for a token"),
        (captioned, ((features[:1], mask[:1]),), "1 captions for a batch of 2"),
    ])  # fmt: skip
    assert captioned((features.double(), mask.bool()))[0].dtype == torch.float32


def test_arrays_trainings_and_comparisons(pipe: DistilledPipeline, tmp_path: Path) -> None:
    teacher, codes = pipe.teacher, pipe.tokenizer.codebook_VC
    assert teacher is not None
    manifest = make_manifest(teacher, "tiny", "0", PairsConfig(num=2, num_steps=2))
    write_pairs(teacher, manifest, tmp_path / "pairs", show_progress=False)
    pairs, labels = Pairs(tmp_path / "pairs"), np.zeros(2, np.int64)
    config = TrainingConfig(steps=1, batch=1, lr=1.0)

    def written(*batches: Any) -> None:
        write_npz(tmp_path / "x.npz", batches, labels)

    def trained(value: Any) -> Any:
        return train(value, pairs, config, tmp_path / "run", identity={})

    def back(ids: Any) -> Tensor:
        return tokens_to_noise(ids, LOG_PROBS, codes, seeded(0), grid=flow_grid(codes, 2))

    check([
        (written, (PICTURES / 1, PICTURES[..., :1], None), "images must be a numpy array uint8"),
        (written, (PICTURES[:1],), "2 labels for 1 images"),
        (lambda v: written(PICTURES[:1], v), (PICTURES[:1, :4],), "images must be of one size"),
        (to_uint8, (None, PICTURES, torch.zeros(3, 8, 8)), "images must be floats"),
        (pairs.batch, (None, [], (0,)), "indices must be a list of whole numbers, got "),
        (pairs.batch, ([-1], [1.5], [2], [True]), "an index of a pair must be "),
        (back, (IDS - 1, IDS + V), "ids must lie in "),
        (trained, (None, pipe), "objective must be Objective, got "),
        (compare, ({}, None, {"a": 3}, {"a": {}}), "results|is no result"),
    ])  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"pairs"}
