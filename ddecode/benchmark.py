"""Honest timing: teacher, student and mixed plans side by side in one run, from labels to uint8 images.

What makes the figures comparable:

- Every row is timed over the same work: drawing the noise, all passes of the networks, decoding, and the conversion
  to uint8 images on the CPU. Loading the models and warming up are outside.
- All rows of a run share dtype and number of threads. The teacher is our own at its best: key-value cache, and both
  halves of guidance in one batch, sampled with its recipe.
- Rows of one batch size take turns, and each repetition begins with another row, so that a machine that slows down
  slows all of them.
- bf16 is autocast around networks and decoder. It stays open for all repetitions of a batch size, so that weights
  are cast in the warm-up, as if the models were held in bf16. It may slow one side down, a CPU teacher's short steps
  above all: before quoting a bf16 speed-up, see that the teacher is not faster in fp32.
"""

import dataclasses
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ddecode.pipeline import DistilledPipeline, to_uint8
from ddecode.plan import Plan

Dtype = Literal["fp32", "bf16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One plan at one batch size. Times are seconds for a whole batch."""

    plan: str
    """`teacher`, a number of student passes, or the plan's text."""
    batch: int
    """Images of one call."""
    dtype: Dtype
    threads: int
    """CPU threads inside an operation."""
    network_evaluations: int
    """Sequential passes of the networks; guidance does not count twice."""
    median_s: float
    p10_s: float
    p90_s: float
    images_per_s: float
    """batch / median_s."""
    peak_bytes: int
    """On CUDA the most memory allocated during this row. On a CPU the highest resident memory of the whole process
    up to this row's last repetition: weights, other rows and smaller batches measured before are in it."""
    network_s: float
    """Median of labels and noise to token embeddings."""
    decode_s: float
    """Median of token embeddings to uint8 images."""
    speedup: float | None
    """The teacher's median over this row's at the same batch; None where the teacher was not measured."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """All rows of one run and the circumstances they share."""

    rows: tuple[BenchmarkRow, ...]
    repeats: int
    warmup: int
    device: str
    """`cpu` or `cuda`."""
    machine: str
    """Name of the processor or GPU."""
    torch: str
    """Version."""
    guidance_scale: float
    top_k: int
    top_p: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"rows": [dataclasses.asdict(row) for row in self.rows]}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One repetition of one plan."""

    network_s: float
    decode_s: float
    peak_bytes: int
    network_evaluations: int

    @property
    def total_s(self) -> float:
        return self.network_s + self.decode_s


def named_plans(pipe: DistilledPipeline, plans: Sequence[int | str]) -> dict[str, Plan]:
    """The plans by the names of their rows, `teacher` first; one asked for twice is measured once.

    Args:
        pipe: the models.
        plans: numbers of student passes, `teacher`, or texts of plans.

    Raises:
        ValueError: there is none, or the pipeline's models cannot do one.
    """
    if not plans:
        raise ValueError("nothing to measure: give steps, such as teacher,1,2, or a plan")
    named: dict[str, Plan] = {}
    for asked in plans:
        if asked == "teacher":
            if pipe.teacher is None:
                raise ValueError("this model has no teacher: leave 'teacher' out of the steps")
            name, plan = "teacher", pipe.plan("teacher")
        elif isinstance(asked, str):
            plan = pipe.plan(plan=asked)
            name = str(plan)
        else:
            name, plan = str(asked), pipe.plan(asked)
        named[name] = plan
    return dict(sorted(named.items(), key=lambda item: item[0] != "teacher"))


def check_settings(
    batches: Sequence[int], *, repeats: int, warmup: int, dtype: str = "fp32", threads: int | None = None
) -> None:
    """Refuse impossible numbers.

    Raises:
        ValueError: one is out of range.
    """
    if not batches:
        raise ValueError("give at least one batch size")
    if min(batches) < 1:
        raise ValueError(f"batch must be at least 1, got {min(batches)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def benchmark(
    pipe: DistilledPipeline,
    plans: Sequence[int | str],
    batches: Sequence[int] = (1,),
    *,
    repeats: int = 20,
    warmup: int = 3,
    dtype: Dtype = "fp32",
    threads: int | None = None,
    seed: int = 0,
) -> BenchmarkResult:
    """Time plans against each other.

    Args:
        pipe: the models; measured on the device they are on.
        plans: numbers of student passes, `teacher`, or texts of plans.
        batches: batch sizes, in images; each is measured apart, in this order.
        repeats: timed repetitions of every plan at every batch size.
        warmup: repetitions before them that do not count.
        dtype: fp32, or bf16 by autocast.
        threads: CPU threads inside an operation during the run, restored after it; None leaves them as they are.
        seed: of the noise; every repetition draws the same.

    Returns:
        Rows by batch size, the teacher's first.

    Raises:
        ValueError: a number is out of range, or the models cannot do a plan.
    """
    check_settings(batches, repeats=repeats, warmup=warmup, dtype=dtype, threads=threads)
    named = named_plans(pipe, plans)
    device = pipe.any_model.device
    rows: list[BenchmarkRow] = []
    with torch.no_grad(), thread_count(threads):
        for batch in dict.fromkeys(batches):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
                timings = take_turns(pipe, named, batch, repeats=repeats, warmup=warmup, seed=seed)
            rows += summarize(timings, batch, dtype)
    recipe = pipe.recipe
    return BenchmarkResult(
        rows=tuple(rows),
        repeats=repeats,
        warmup=warmup,
        device=device.type,
        machine=machine_name(device),
        torch=torch.__version__,
        guidance_scale=recipe.guidance_scale,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
    )


def take_turns(
    pipe: DistilledPipeline, named: Mapping[str, Plan], batch: int, *, repeats: int, warmup: int, seed: int
) -> dict[str, list[Timing]]:
    """Repeat all plans in turns; repetition i begins with plan i modulo their number."""
    labels_B = torch.arange(batch) % pipe.num_classes
    names = list(named)
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for repetition in range(-warmup, repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            timing = time_once(pipe, named[name], labels_B, torch.Generator().manual_seed(seed))
            if repetition >= 0:
                timings[name].append(timing)
    return timings


def time_once(pipe: DistilledPipeline, plan: Plan, labels_B: torch.Tensor, generator: torch.Generator) -> Timing:
    """One call from labels to uint8 images, its two parts on one clock."""
    device = pipe.any_model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = clock(device)
    progress = pipe.emit(labels_B, plan, generator)
    emitted = clock(device)
    to_uint8(pipe.tokenizer.decode(progress.embeddings_BLC))
    end = clock(device)
    return Timing(
        network_s=emitted - begin,
        decode_s=end - emitted,
        peak_bytes=peak_bytes(device),
        network_evaluations=progress.network_evaluations,
    )


def summarize(timings: Mapping[str, Sequence[Timing]], batch: int, dtype: Dtype) -> list[BenchmarkRow]:
    """The rows of one batch size, while its number of threads is still set."""
    medians = {name: quantile([t.total_s for t in own], 50) for name, own in timings.items()}
    teacher_s = medians.get("teacher")
    rows = []
    for name, own in timings.items():
        totals = [t.total_s for t in own]
        rows.append(
            BenchmarkRow(
                plan=name,
                batch=batch,
                dtype=dtype,
                threads=torch.get_num_threads(),
                network_evaluations=own[0].network_evaluations,
                median_s=medians[name],
                p10_s=quantile(totals, 10),
                p90_s=quantile(totals, 90),
                images_per_s=batch / medians[name],
                peak_bytes=max(t.peak_bytes for t in own),
                network_s=quantile([t.network_s for t in own], 50),
                decode_s=quantile([t.decode_s for t in own], 50),
                speedup=None if teacher_s is None else teacher_s / medians[name],
            )
        )
    return rows


def quantile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def clock(device: torch.device) -> float:
    """Seconds, when all work given to the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """See `BenchmarkRow.peak_bytes`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # macOS counts bytes, Linux KiB


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads for a while; None leaves it alone."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def machine_name(device: torch.device) -> str:
    """What the GPU or the processor calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
