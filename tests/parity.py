"""Upstream's own figures: random weights and what the original code computed from them, where they are at hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="upstream's tensors are not at ../shared/parity")


def fixture(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A file's config, and its tensors by part: model, tokenizer, in, out."""
    with safe_open(PARITY / f"{name}.safetensors", "pt") as file:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "tokenizer": {}, "in": {}, "out": {}}
        for key in sorted(file.keys()):
            part, _, rest = key.partition(".")
            parts[part][rest] = file.get_tensor(key)
        return json.loads(file.metadata()["config"]), parts


def close(ours: Tensor, theirs: Tensor, limit: float = 2e-4) -> None:
    """Equal to a share of the largest magnitude."""
    assert (ours - theirs.float()).abs().max() <= limit * theirs.float().abs().max()
