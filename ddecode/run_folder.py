"""A training run on disk: its checkpoint and its log."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ddecode.arguments import shown
from ddecode.checkpoint import save_tensors
from ddecode.files import opened_aside, rename, write_aside
from ddecode.processes import meet, rank
from ddecode.sharding import dealt, dealt_moments, kept, kept_moments

SUMS = "SHA256SUMS"
"""As `sha256sum -c` reads it."""
STATE, OPTIMIZER, EMA, CRITICS = "state.json", "optimizer.pt", "ema.safetensors", "critics.safetensors"


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_new(run: Path, stages: Iterable[str] = ("",), *, resume: bool) -> None:
    """
    Raises:
        ValueError: there is a run in this folder, or one of its stages, and it shall not go on.
    """
    if not resume and any(Checkpoint(run / stage).exists() for stage in stages):
        raise ValueError(f"{run} holds a run already; add --resume to go on with it, or choose another --out")


def found_checkpoint(run: Path) -> "Checkpoint":
    """A run's, back in its place for all processes where a kill fell between two renames."""
    checkpoint = Checkpoint(run)
    if rank() == 0:
        checkpoint.restore()
    meet()
    return checkpoint


class Checkpoint:
    """The state of a run: `RUN/checkpoint`, replaced as a whole, and `RUN/checkpoint.old`, the one before it.

    `model.safetensors`, `ema.safetensors` and, where there are any, `critics.safetensors` hold weights, `optimizer.pt`
    Adam's moments, `state.json` the step and the config it belongs to, `SHA256SUMS` the checksums of these.
    """

    def __init__(self, run: Path) -> None:
        self.folder, self.old = run / "checkpoint", run / "checkpoint.old"

    def exists(self) -> bool:
        return self.folder.exists()

    def state(self) -> dict[str, Any]:
        """The `step`, and the `identity`: what the run is made of.

        Raises:
            ValueError: the file is missing or damaged.
        """
        state: dict[str, Any] = json.loads(self.checked(STATE).read_text())
        return state

    def save(self, step: int, identity: Mapping[str, Any], networks: Mapping[str, nn.Module], optimizer: Any) -> None:
        """Write all; `networks` by the names of their files. All processes must call it, as they may have a part each
        of the tensors; the first one writes.

        Raises:
            OSError: the disk is full, say. The checkpoint is as it was then.
        """
        weights = {name: kept(module.state_dict()) for name, module in networks.items()}
        moments = kept_moments(optimizer)
        if rank():
            return
        aside = self.folder.with_name("checkpoint.new")
        shutil.rmtree(aside, ignore_errors=True)
        if self.old.exists():  # now, as there is not always room for three
            self.old.rename(aside)
            shutil.rmtree(aside)
        try:
            self.fill(aside, step, identity, weights, moments)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if self.exists():
            rename(self.folder, self.old)
        rename(aside, self.folder)

    def fill(
        self,
        folder: Path,
        step: int,
        identity: Mapping[str, Any],
        weights: Mapping[str, Mapping[str, Tensor]],
        moments: Mapping[str, Any],
    ) -> None:
        folder.mkdir(parents=True)
        for name, tensors in weights.items():
            save_tensors(folder / f"{name}.safetensors", tensors)
        with opened_aside(folder / OPTIMIZER) as stream:
            torch.save(moments, stream)
        write_aside(folder / STATE, json.dumps({"step": step, "identity": identity}, indent=2).encode())
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
        write_aside(folder / SUMS, "".join(sums).encode())

    def restore(self) -> None:
        """Put the checkpoint before in its place where there is none: where a kill fell between the two renames of
        `save`, or a damaged one was deleted."""
        if not self.exists() and self.old.exists():
            self.old.rename(self.folder)

    def load(self, identity: Mapping[str, Any], networks: Mapping[str, nn.Module], optimizer: Any) -> int:
        """Fill all in place. Returns the number of steps done.

        Raises:
            ValueError: the run was made with another config, or a file is missing or damaged; nothing is filled then.
        """
        state = self.state()
        if other := differences(state["identity"], json.loads(json.dumps(identity))):
            facts = ", ".join(other)
            raise ValueError(f"{self.folder.parent} was begun with another config: {facts}; choose another --out")
        weights = {name: self.checked(f"{name}.safetensors") for name in networks}
        moments = self.checked(OPTIMIZER)
        for name, module in networks.items():
            with safe_open(weights[name], "pt") as file:
                if set(file.keys()) != module.state_dict().keys():
                    raise ValueError(f"{weights[name]} is of another version of ddecode; begin the run again")
        for name, module in networks.items():
            module.load_state_dict(dealt(load_file(weights[name]), module.state_dict()))
        state_of_all = torch.load(moments, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(dealt_moments(state_of_all, optimizer))
        return state["step"]

    def checked(self, name: str) -> Path:
        """The path of a file that is as it was written.

        Raises:
            ValueError: it is not.
        """
        path, sums = self.folder / name, self.folder / SUMS
        for file in (sums, path):
            if not file.is_file():
                raise ValueError(f"{file} is missing; {self.remedy()}")
        if f"{sha256(path)}  {name}" not in sums.read_text(errors="replace").splitlines():
            raise ValueError(f"{path} is damaged: its checksum is not that of {SUMS}; {self.remedy()}")
        return path

    def remedy(self) -> str:
        after = "go on from the checkpoint before it" if self.old.exists() else "begin the run again"
        return f"delete {self.folder} and --resume to {after}"


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str = "") -> list[str]:
    """What two trees of plain data differ in, each as `key (value, not value)`."""
    found: list[str] = []
    for key in sorted({*theirs, *ours}):
        before, now = theirs.get(key), ours.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{where}{key}.")
        elif before != now or (key in theirs) != (key in ours):
            a, b = (shown(tree[key]) if key in tree else "left out" for tree in (theirs, ours))
            found.append(f"{where}{key} ({a}, not {b})")
    return found


class Log:
    """One JSON object a line, each written at once; those from beyond the step a run resumes at are dropped first.

    Raises:
        ValueError: a line is damaged. The last one may be torn, and is dropped.
    """

    def __init__(self, path: Path, begin: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= begin:
                    kept.append(line.rstrip() + b"\n")
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise ValueError(f"{path} is damaged in line {number}; delete that line and --resume") from None
        write_aside(path, b"".join(kept))
        self.path = path
        self.stream = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """
        Raises:
            OSError: the disk is full. The log is as it was then.
        """
        end, line = self.stream.tell(), f"{json.dumps(row)}\n".encode()
        if self.stream.write(line) < len(line):
            self.stream.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def sync(self) -> None:
        os.fsync(self.stream.fileno())
