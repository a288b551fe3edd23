"""What making pairs and training will cost here: time, disk and memory, measured on a few small batches before the long
run.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ddecode.config import DistillConfig
from ddecode.distillation import distill
from ddecode.machine import clock, peak_bytes, reset_peak
from ddecode.pairs import Manifest, make_batch, shard_bytes
from ddecode.processes import launch
from ddecode.teacher import Teacher
from ddecode.training_config import TrainingConfig

GIB = 2**30
FIRST_BATCH = 4
"""Of training, timed to see how large a one may follow."""
WARMUP_STEPS, TIMED_STEPS = 2, 4
"""Of training; the second compiles anew where sizes change. Together they go through the run's schedule of weights."""


def measured(batch: int, whole: int) -> str:
    """For people: at which batch, and whether the recipe's `whole` one is larger."""
    beyond = f", extrapolated to the recipe's {whole}" if batch < whole else ""
    return f"measured at batch {batch}{beyond}"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The cost of the pairs that a manifest asks for, on this machine with one process."""

    pairs: int
    seconds: float
    disk_bytes: int
    memory_bytes: int
    """Peak of the process at the manifest's batch size."""
    batch: int
    """The batch size of the recipe."""
    measured_batch: int
    """The largest one that was measured; time and memory are extrapolated from it where it is smaller."""
    device: str

    def __str__(self) -> str:
        rate = self.pairs / self.seconds
        return (
            f"{self.pairs} pairs on one {self.device}: {self.seconds / 3600:.2f} hours ({rate:.2f} pairs/s), "
            f"{self.disk_bytes / GIB:.3f} GiB on disk, {self.memory_bytes / GIB:.1f} GiB of memory "
            f"({measured(self.measured_batch, self.batch)})"
        )


def forecast(teacher: Teacher, manifest: Manifest, *, patience_s: float = 20.0) -> Forecast:
    """Time batches of growing size until one takes a quarter of `patience_s` or the recipe's size is reached.

    The first batch warms up and is not counted. A larger batch is never slower for each pair, so the time is an upper
    bound where it is extrapolated; memory grows in proportion to the batch, so two sizes give its slope.
    """
    run(teacher, manifest, 1)
    sizes, peaks, seconds = [], [], 0.0
    begin, batch = time.monotonic(), 1
    while True:
        seconds = run(teacher, manifest, batch)
        sizes.append(batch)
        peaks.append(peak_bytes(teacher.device))
        slow = seconds > patience_s / 4 or time.monotonic() - begin > patience_s
        if slow or batch == manifest.batch:
            break
        batch = min(4 * batch, manifest.batch)
    slope = (peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
    return Forecast(
        pairs=manifest.num,
        seconds=seconds / batch * manifest.num,
        disk_bytes=shard_bytes(manifest),
        memory_bytes=int(peaks[-1] + slope * (manifest.batch - batch)),
        batch=manifest.batch,
        measured_batch=batch,
        device=teacher.device.type,
    )


def run(teacher: Teacher, manifest: Manifest, batch: int) -> float:
    """Seconds for one batch of pairs."""
    begin = clock(teacher.device)
    make_batch(teacher, manifest, range(batch))
    return clock(teacher.device) - begin


@dataclass(frozen=True, kw_only=True)
class TrainingForecast:
    """The cost of a distillation, on this machine with one process; previews are left out."""

    steps: int
    seconds: float
    tuning_seconds: float
    """Of DD2's first stage; 0 without one."""
    memory_bytes: int
    disk_bytes: int
    """Two checkpoints of each stage and the model."""
    batch: int
    measured_batch: int
    """Time and memory are extrapolated from it where it is smaller."""
    device: str

    def __str__(self) -> str:
        first = f", after {self.tuning_seconds / 3600:.2f} of the first stage" if self.tuning_seconds else ""
        return (
            f"{self.steps} steps of {self.batch} on one {self.device}: {self.seconds / 3600:.2f} hours "
            f"({self.seconds / self.steps:.2f} s a step){first}, {self.memory_bytes / GIB:.1f} GiB of memory, "
            f"{self.disk_bytes / GIB:.3f} GiB on disk ({measured(self.measured_batch, self.batch)})"
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A few steps of a training."""

    batch: int
    seconds: float
    """Of a step."""
    tuning_seconds: float
    """Of a step of DD2's first stage."""
    memory_bytes: int
    disk_bytes: int


def forecast_training(config: DistillConfig, pairs_folder: Path, *, patience_s: float = 40.0) -> TrainingForecast:
    """Train a few steps of a small batch, and then of the largest one, up to the recipe's, that a step of takes no more
    than an eighth of `patience_s`.

    A larger batch is never slower for each sample, so the time is an upper bound where it is extrapolated. The
    teacher's probabilities are worked out anew, as in the first epoch; what is cached of them (`objective.cache_gib`)
    makes later ones faster and is counted as memory. Real images of an adversarial term are left out.

    Args:
        config: the recipe.
        pairs_folder: pairs of its teacher, of which a few are enough.

    Raises:
        ValueError: see `ddecode.distillation.distill`; there are several processes.
    """
    if launch().num_processes > 1:
        raise ValueError("--dry-run measures one process: run it without a launcher")
    batch, objective = config.training.batch, config.objective
    first = last = trial(config, pairs_folder, min(batch, FIRST_BATCH))
    fits = int(patience_s / 8 / first.seconds * first.batch)
    if min(batch, fits) > first.batch:
        last = trial(config, pairs_folder, min(batch, fits))
    grown = last.batch - first.batch
    slope = max(0.0, (last.memory_bytes - first.memory_bytes) / grown) if grown else 0.0
    tuning = objective.score.tuning if objective.score.weight else None
    return TrainingForecast(
        steps=config.training.steps,
        seconds=last.seconds * batch / last.batch * config.training.steps,
        tuning_seconds=last.tuning_seconds * tuning.batch / last.batch * tuning.steps if tuning else 0.0,
        memory_bytes=int(last.memory_bytes + slope * (batch - last.batch) + objective.cache_gib * GIB),
        disk_bytes=last.disk_bytes,
        batch=batch,
        measured_batch=last.batch,
        device=launch().device.type,
    )


def trial(config: DistillConfig, pairs_folder: Path, batch: int) -> Trial:
    """Train a few steps of this batch in a folder that does not stay."""
    objective, score = config.objective, config.objective.score
    steps = WARMUP_STEPS + TIMED_STEPS * score.updates

    def shortened(training: TrainingConfig) -> TrainingConfig:
        return replace(training, steps=steps, batch=batch, log_every=1, save_every=steps, preview_every=0, report_to=())

    score = replace(score, tuning=None if score.tuning is None else shortened(score.tuning))
    objective = replace(objective, score=score, adversarial=replace(objective.adversarial, images=None))
    short = replace(config, training=shortened(config.training), objective=objective)
    reset_peak(launch().device)
    with TemporaryDirectory(prefix="dry-run-", dir=pairs_folder.parent) as aside:  # where there is room for a run
        run = Path(aside) / "run"
        distill(short, pairs_folder, run, show_progress=False)
        return Trial(
            batch=batch,
            seconds=seconds_of_a_step(run),
            tuning_seconds=seconds_of_a_step(run / "tuning") if (run / "tuning").is_dir() else 0.0,
            memory_bytes=peak_bytes(launch().device),
            disk_bytes=2 * sum(bytes_below(stage / "checkpoint") for stage in (run, run / "tuning"))
            + bytes_below(run / "model"),
        )


def seconds_of_a_step(run: Path) -> float:
    """By a log of every step, without those that warm up."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][WARMUP_STEPS - 1 :]
    return (rows[-1]["seconds"] - rows[0]["seconds"]) / (len(rows) - 1)


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
