"""Honest timing: teacher, student and mixed plans side by side in one run, from labels to uint8 images.

What makes the figures comparable:

- Every row is timed over the same work: drawing the noise, all passes of the networks, decoding, and the conversion
  to uint8 images on the CPU. Loading the models, warming up and compiling are outside, and reported apart.
- All rows of a run share dtype and number of threads. The teacher is our own at its best: key-value cache, and both
  halves of guidance in one batch, sampled with its recipe.
- Rows of one batch size take turns, and each repetition begins with another row, so that a machine that slows down
  slows all of them.
- Beside the times stands what the machine could do: the operations of networks and decoder are counted, and their rate
  is set against that of a large square matrix product of the same dtype in the same run.

Half precision is that of `DistilledPipeline.to`. It may slow one side down, a CPU teacher's short steps above all:
before quoting its speed-up, see that the teacher is not faster in fp32.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ddecode.arguments import check_whole
from ddecode.compilation import is_compiled
from ddecode.images import to_uint8
from ddecode.machine import clock, machine_name, matmul_rate, peak_bytes, reset_peak, thread_count
from ddecode.operations import counted
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan
from ddecode.student import Student

Dtype = Literal["fp32", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One plan at one batch size. Times are seconds for a whole batch."""

    plan: str
    """`teacher`, a number of student passes, or the plan's text."""
    batch: int
    """Images of one call."""
    dtype: str
    """Of the networks: `fp32`, `bf16`, or torch's name of another."""
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
    """On CUDA the most memory allocated during this row. On a CPU the process's highest resident memory during it, all
    models' weights included; where the system cannot tell it apart (all but Linux), up to its end."""
    network_s: float
    """Median of labels and noise to token embeddings."""
    decode_s: float
    """Median of token embeddings to the decoder's output."""
    rest_s: float
    """Median of the decoder's output to uint8 images on the CPU."""
    network_operations: int
    """Floating-point operations of the networks in one call; see `ddecode.operations`."""
    decode_operations: int
    """Those of the decoder."""
    network_rate: float
    """Operations a second of the networks: network_operations / network_s."""
    network_share: float
    """network_rate over the rate of a large matrix product."""
    decode_rate: float
    decode_share: float
    """The same of the decoder."""
    floor_s: float
    """What all these operations would take at the rate of a large matrix product."""
    warmup_s: tuple[float, ...]
    """Of each untimed repetition; the first one compiles, where that was asked for."""
    speedup: float | None
    """The teacher's median over this row's at the same batch; None where the teacher was not measured."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """All rows of one run and the circumstances they share."""

    rows: tuple[BenchmarkRow, ...]
    repeats: int
    warmup: int
    compiled: bool
    device: str
    """`cpu` or `cuda`."""
    machine: str
    """Name of the processor or GPU."""
    matmul_rate: float
    """Operations a second in a large square matrix product of the rows' dtype; see `ddecode.machine`."""
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
    rest_s: float
    peak_bytes: int
    network_evaluations: int

    @property
    def total_s(self) -> float:
        return self.network_s + self.decode_s + self.rest_s


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Floating-point operations of one call."""

    network: int
    decode: int


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
    batches: Sequence[int], *, repeats: int, warmup: int, compiled: bool = False, threads: int | None = None
) -> None:
    """Refuse impossible numbers.

    Raises:
        ValueError: one is out of range.
    """
    if not batches:
        raise ValueError("give at least one batch size")
    for batch in batches:
        check_whole("batch", batch, 1)
    check_whole("repeats", repeats, 1)
    check_whole("warmup", warmup, 1 if compiled else 0)
    if threads is not None:
        check_whole("threads", threads, 1)


def benchmark(
    pipe: DistilledPipeline,
    plans: Sequence[int | str],
    batches: Sequence[int] = (1,),
    *,
    repeats: int = 20,
    warmup: int = 3,
    compiled: bool = False,
    threads: int | None = None,
    seed: int = 0,
    rate: float | None = None,
) -> BenchmarkResult:
    """Time plans against each other.

    Args:
        pipe: the models; measured on their device and in their dtype.
        plans: numbers of student passes, `teacher`, or texts of plans.
        batches: batch sizes, in images; each is measured apart, in this order.
        repeats: timed repetitions of every plan at every batch size.
        warmup: repetitions before them that do not count.
        compiled: compile the students first, in place; see `DistilledPipeline.compile`. It happens in the warm-up,
            which must have a repetition then.
        threads: CPU threads inside an operation during the run, restored after it; None leaves them as they are.
        seed: of the noise; every repetition draws the same.
        rate: operations a second of a large matrix product; None measures it.

    Returns:
        Rows by batch size, the teacher's first.

    Raises:
        ValueError: a number is out of range, or the models cannot do a plan.
    """
    check_settings(batches, repeats=repeats, warmup=warmup, compiled=compiled, threads=threads)
    named, batches = named_plans(pipe, plans), list(dict.fromkeys(batches))
    rows: list[BenchmarkRow] = []
    with torch.no_grad(), thread_count(threads):
        rate = matmul_rate(pipe.device, pipe.dtype) if rate is None else rate
        costs = {batch: {name: cost(pipe, plan, batch, seed) for name, plan in named.items()} for batch in batches}
        if compiled:
            pipe.compile()
        for batch in batches:
            warmups, timings = take_turns(pipe, named, batch, repeats=repeats, warmup=warmup, seed=seed)
            rows += summarize(timings, warmups, costs[batch], rate, batch, dtype_name(pipe.dtype))
    return BenchmarkResult(
        rows=tuple(rows),
        repeats=repeats,
        warmup=warmup,
        compiled=compiled or any(isinstance(model, Student) and is_compiled(model) for model in pipe.models.values()),
        device=pipe.device.type,
        machine=machine_name(pipe.device),
        matmul_rate=rate,
        torch=torch.__version__,
        guidance_scale=pipe.recipe.guidance_scale,
        top_k=pipe.recipe.top_k,
        top_p=pipe.recipe.top_p,
    )


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def some_labels(pipe: DistilledPipeline, batch: int) -> Any:
    """Class labels int64 [B] in turn; for a model of captions, features of which the second half is real."""
    if pipe.num_classes:
        return torch.arange(batch) % pipe.num_classes
    features_BPE, mask_BP = pipe.any_model.backbone.null_labels(batch)
    positions_P = torch.arange(mask_BP.shape[1], device=mask_BP.device)
    real_P = (positions_P >= len(positions_P) // 2).to(mask_BP.dtype)
    return torch.randn(features_BPE.shape, generator=seeded(0)).to(features_BPE), real_P.expand_as(mask_BP)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cost(pipe: DistilledPipeline, plan: Plan, batch: int, seed: int) -> Cost:
    """The operations of one call, which is made for it; what a student works out once and keeps is not among them."""
    if any(isinstance(pipe.models[span.who], Student) for span in plan.spans):
        pipe.emit(some_labels(pipe, 1), plan, seeded(seed))
    with counted() as network:
        progress = pipe.emit(some_labels(pipe, batch), plan, seeded(seed))
    with counted() as decode:
        pipe.decode(progress.embeddings_BLC)
    return Cost(network=network.count, decode=decode.count)


def take_turns(
    pipe: DistilledPipeline, named: Mapping[str, Plan], batch: int, *, repeats: int, warmup: int, seed: int
) -> tuple[dict[str, list[Timing]], dict[str, list[Timing]]]:
    """Repeat all plans in turns; repetition i begins with plan i modulo their number. Warm-ups, then what counts."""
    labels = some_labels(pipe, batch)
    names = list(named)
    warmups: dict[str, list[Timing]] = {name: [] for name in names}
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for repetition in range(-warmup, repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            timing = time_once(pipe, named[name], labels, seeded(seed))
            (warmups if repetition < 0 else timings)[name].append(timing)
    return warmups, timings


def time_once(pipe: DistilledPipeline, plan: Plan, labels: Any, generator: torch.Generator) -> Timing:
    """One call from labels to uint8 images, its parts on one clock."""
    device = pipe.device
    reset_peak(device)
    begin = clock(device)
    progress = pipe.emit(labels, plan, generator)
    emitted = clock(device)
    images_B3HW = pipe.decode(progress.embeddings_BLC)
    decoded = clock(device)
    to_uint8(images_B3HW)
    end = clock(device)
    return Timing(
        network_s=emitted - begin,
        decode_s=decoded - emitted,
        rest_s=end - decoded,
        peak_bytes=peak_bytes(device),
        network_evaluations=progress.network_evaluations,
    )


def summarize(
    timings: Mapping[str, Sequence[Timing]],
    warmups: Mapping[str, Sequence[Timing]],
    costs: Mapping[str, Cost],
    rate: float,
    batch: int,
    dtype: str,
) -> list[BenchmarkRow]:
    """The rows of one batch size, while its number of threads is still set."""
    medians = {name: quantile([t.total_s for t in own], 50) for name, own in timings.items()}
    teacher_s = medians.get("teacher")
    rows = []
    for name, own in timings.items():
        totals = [t.total_s for t in own]
        network_s, decode_s, rest_s = (
            quantile(part, 50) for part in zip(*((t.network_s, t.decode_s, t.rest_s) for t in own), strict=True)
        )
        operations = costs[name]
        network_rate, decode_rate = operations.network / network_s, operations.decode / decode_s
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
                network_s=network_s,
                decode_s=decode_s,
                rest_s=rest_s,
                network_operations=operations.network,
                decode_operations=operations.decode,
                network_rate=network_rate,
                network_share=network_rate / rate,
                decode_rate=decode_rate,
                decode_share=decode_rate / rate,
                floor_s=(operations.network + operations.decode) / rate,
                warmup_s=tuple(t.total_s for t in warmups[name]),
                speedup=None if teacher_s is None else teacher_s / medians[name],
            )
        )
    return rows


def quantile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))
