"""The machine that code is timed on: its name, clock, memory, threads, and how fast it multiplies matrices."""

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ddecode.linear import linear

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
MATMUL_REPEATS = 4


def clock(device: torch.device) -> float:
    """Seconds, when all work given to the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """On CUDA the most memory allocated since `reset_peak`; on a CPU the process's highest resident memory since then,
    or, where the system cannot reset it (all but Linux), since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # macOS counts bytes, Linux KiB


def reset_peak(device: torch.device) -> None:
    """Begin `peak_bytes` anew from what is in memory now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            CLEAR.write_text("5")


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


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the product of two large square matrices, the best of a few products.

    What a network could reach here if it were nothing but such products: 2 n^3 operations over the time. On a CPU there
    are two ways to them (see `ddecode.linear`), of which the faster one counts.
    """
    side = MATMUL_SIDE.get(device.type, MATMUL_SIDE["cpu"])
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    seconds = []
    for multiply in (torch.mm, linear) * MATMUL_REPEATS:
        begin = clock(device)
        multiply(a, b)
        seconds.append(clock(device) - begin)
    return 2 * side**3 / min(seconds)
