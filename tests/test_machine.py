"""What the machine says of itself. Nothing here depends on how fast it is."""

import subprocess
import sys

import pytest
import torch

from ddecode.machine import STATUS, clock, machine_name, matmul_rate, thread_count

CPU = torch.device("cpu")


ALONE = """
import torch
from ddecode.machine import peak_bytes, reset_peak

device, block = torch.device("cpu"), 64 * 2**20
reset_peak(device)
before = peak_bytes(device)
tensor = torch.ones(block, dtype=torch.uint8)
print((peak_bytes(device) - before) / block)
del tensor
reset_peak(device)
print((peak_bytes(device) - before) / block)
"""


@pytest.mark.skipif(not STATUS.is_file(), reason="only Linux begins the peak anew")
def test_the_peak_is_of_what_came_after_its_reset() -> None:
    """In a process of its own: one that has freed much memory may use it again without asking for more."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    held, freed = map(float, done.stdout.split())
    assert held > 0.9 and freed < 0.5


def test_the_matmul_rate_is_operations_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 4.0, 10.0, 13.0, 20.0, 22.0, 30.0, 34.0])
    monkeypatch.setattr("ddecode.machine.clock", lambda device: next(times))
    monkeypatch.setattr("ddecode.machine.MATMUL_SIDE", {"cpu": 16})
    monkeypatch.setattr("ddecode.machine.MATMUL_REPEATS", 2)
    assert matmul_rate(CPU, torch.bfloat16) == 2 * 16**3 / 2.0


def test_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="boom"), thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError("boom")
    assert torch.get_num_threads() == before
    with thread_count(None):
        assert torch.get_num_threads() == before


def test_clock_and_name() -> None:
    assert clock(CPU) <= clock(CPU)
    assert machine_name(CPU)
