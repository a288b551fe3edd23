"""What making pairs will cost here: time, disk and memory, measured on a few small batches before the long run.

B batch, L token positions.
"""

import time
from dataclasses import dataclass

import torch

from ddecode.machine import clock, peak_bytes
from ddecode.pairs import Manifest, noise_of, shard_bytes
from ddecode.randomness import sample_seed
from ddecode.teacher import Teacher
from ddecode.trajectory import resolve

GIB = 2**30


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
        measured = f"measured at batch {self.measured_batch}"
        if self.measured_batch < self.batch:
            measured += f", extrapolated to the recipe's {self.batch}"
        return (
            f"{self.pairs} pairs on one {self.device}: {self.seconds / 3600:.2f} hours ({rate:.2f} pairs/s), "
            f"{self.disk_bytes / GIB:.3f} GiB on disk, {self.memory_bytes / GIB:.1f} GiB of memory ({measured})"
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


@torch.no_grad()
def run(teacher: Teacher, manifest: Manifest, batch: int) -> float:
    """Seconds for one batch of pairs."""
    seeds = [sample_seed(manifest.seed, i) for i in range(batch)]
    labels = torch.arange(batch) % manifest.num_classes
    begin = clock(teacher.device)
    noise_BLC = noise_of(seeds, (manifest.length, manifest.code_width))
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=manifest.precision == "bf16"):
        resolve(teacher, noise_BLC, labels, **manifest.recipe, num_steps=manifest.num_steps)
    return clock(teacher.device) - begin
