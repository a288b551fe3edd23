"""Where a run shows itself beside its log: TensorBoard and Weights & Biases.

`log.jsonl` holds everything whether or not there is a reporter. Of a metric by position, which is a list there, a
reporter shows the means over its eighths, as `tools/draw_curves.py` does. A run that goes on goes on in its reporters
too: in TensorBoard what came after its checkpoint is purged; W&B keeps it, and ignores it when it comes again, equal.
"""

import importlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ddecode.files import write_aside
from ddecode.training_config import ReporterName

GROUPS = 8
"""Curves of a metric by position, at most."""


class Reporter(Protocol):
    """Shows what is measured at a step."""

    def write(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `RUN/tensorboard`.

    Args:
        run: the run's folder.
        begin: the number of steps that are done; events from beyond them are purged.
    """

    def __init__(self, run: Path, *, begin: int) -> None:
        self.writer = library("tensorboard").SummaryWriter(str(run / "tensorboard"), purge_step=begin + 1)

    def write(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()  # rows that a checkpoint says are done will not come again

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project `WANDB_PROJECT` or else `ddecode`; W&B's other environment variables hold too.

    Args:
        run: the run's folder. `wandb.id` in it names W&B's run, which goes on where this one does.
        begin: the number of steps that are done; with 0 it is a new run.
        config: what the run is made of, to be shown beside it.

    Raises:
        ValueError: W&B refuses, for want of a login say.
    """

    def __init__(self, run: Path, *, begin: int, config: Mapping[str, Any]) -> None:
        self.library, path = library("wandb"), run / "wandb.id"
        if begin == 0 or not path.exists():
            write_aside(path, secrets.token_hex(4).encode())
        try:
            self.run = self.library.init(
                project=os.environ.get("WANDB_PROJECT", "ddecode"),
                name=os.environ.get("WANDB_NAME", str(run)),
                id=path.read_text(),
                resume="allow",
                dir=str(run),
                config=dict(config),
            )
        except self.library.Error as error:
            raise ValueError(f"training.report_to: wandb: {error}") from None

    def write(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        shown = {name: self.library.Image(picture) for name, picture in pictures.items()}
        self.run.log({**values, **shown}, step=step)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def library(name: ReporterName) -> Any:
    """A reporter's library.

    Raises:
        ValueError: it is not installed.
    """
    module, entry = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}[name]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"training.report_to: {name} is not installed ({error}): pip install {name}") from None
    if not hasattr(library, entry):  # a folder that W&B made where one works imports as well, empty
        raise ValueError(f"training.report_to: {name} is not installed: pip install {name}")
    return library


def check_reporters(names: Sequence[ReporterName]) -> None:
    """
    Raises:
        ValueError: the library of one is not installed.
    """
    for name in names:
        library(name)


class Reports:
    """Rows of a log and pictures, to any number of reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = reporters

    def write(self, step: int, row: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> None:
        """A row as it is logged, but for its step, and pictures; nothing where there are none."""
        if row or pictures:
            for reporter in self.reporters:
                reporter.write(step, curves(row), pictures)


@contextmanager
def opened_reports(
    names: Sequence[ReporterName], run: Path, *, begin: int, config: Mapping[str, Any]
) -> Iterator[Reports]:
    """The reporters of a run until it ends, well or not.

    Args:
        names: of the reporters, none of them twice.
        run: its folder.
        begin: the number of steps that are done.
        config: what it is made of.

    Raises:
        ValueError: the library of one is not installed, or refuses.
    """
    with ExitStack() as stack:
        reporters: list[Reporter] = []
        for name in names:
            reporter: Reporter
            if name == "tensorboard":
                reporter = TensorBoard(run, begin=begin)
            else:
                reporter = WeightsAndBiases(run, begin=begin, config=config)
            stack.push(lambda kind, *_, reporter=reporter: reporter.close(failed=kind is not None))
            reporters.append(reporter)
        yield Reports(reporters)


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers as they are, lists as the means over their eighths; what has no value is left out."""
    values: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            means = grouped(value)
            values |= {f"{name}/{i}of{len(means)}": mean for i, mean in enumerate(means, start=1)}
        elif value is not None:
            values[name] = float(value)
    return values


def grouped(values: Sequence[float]) -> list[float]:
    """A metric by position as it is drawn: its means over each eighth of the positions, or itself where it is short."""
    return [float(part.mean()) for part in np.array_split(values, min(GROUPS, len(values)))]
