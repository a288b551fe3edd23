"""State dicts as people have them: reading files without running code, unwrapping, strict loading."""

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

StateOrPath = Mapping[str, Any] | str | Path


def read_state(
    source: StateOrPath, wrappers: tuple[str, ...] = ("model", "module", "state_dict", "ema")
) -> dict[str, Tensor]:
    """A flat dict of tensors from a dict or a file (`.safetensors`, `.pt`, `.pth`).

    Args:
        source: the state itself, possibly wrapped, or a path.
        wrappers: keys under which training code nests the weights, the preferred one first.

    Raises:
        ValueError: no such file, a damaged or unknown one, or one that holds more than tensors and plain values.
    """
    tree: Any = source if isinstance(source, Mapping) else read_file(Path(source))
    while not all(isinstance(v, Tensor) for v in tree.values()):
        inner = next((tree[w] for w in wrappers if isinstance(tree.get(w), Mapping)), None)
        if inner is None:
            raise ValueError(
                f"found no weights: expected tensors, or one of {', '.join(wrappers)}; got {preview(tree)}"
            )
        tree = inner
    if not tree:
        raise ValueError("the state is empty")
    return {name.removeprefix("module."): tensor for name, tensor in tree.items()}


def read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no checkpoint file {path}")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path.name}: expected .safetensors, .pt or .pth")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        raise ValueError(f"{path} cannot be read safely: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no dict of weights")
    return tree


def preview(names: Any) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Assign `state` to `module` in fp32, by name.

    Raises:
        ValueError: keys are missing, extra or misshapen; all are named in one line.
    """
    target = module.state_dict()
    problems = []
    if missing := [n for n in target if n not in state]:
        problems.append(f"missing {preview(missing)}")
    if extra := [n for n in state if n not in target]:
        problems.append(f"unknown {preview(extra)}")
    shapes = [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(target[n].shape)}"
        for n in target
        if n in state and state[n].shape != target[n].shape
    ]
    if shapes:
        problems.append(
            "misshapen " + "; ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
        )
    if problems:
        raise ValueError(f"this state is no {what}: " + "; ".join(problems))
    floats = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    module.load_state_dict(floats, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
