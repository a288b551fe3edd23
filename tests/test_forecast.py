"""What pairs will cost: the figures are those of the real run."""

import dataclasses
from pathlib import Path

import pytest
from tiny import make_teacher

from ddecode import forecast as forecast_module
from ddecode.config import PairsConfig
from ddecode.forecast import forecast
from ddecode.pairs import make_manifest, write_pairs


def test_disk_is_what_the_shards_take(tmp_path: Path) -> None:
    teacher = make_teacher()
    manifest = make_manifest(teacher, "toy", "hash", PairsConfig(num=40, shard_size=16, batch=8))
    told = forecast(teacher, manifest)
    write_pairs(teacher, manifest, tmp_path, show_progress=False)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    headers = 3 * 512
    assert told.disk_bytes <= written <= told.disk_bytes + headers
    assert told.pairs == 40 and told.measured_batch == told.batch == 8 and told.device == "cpu"


def test_time_and_memory_are_extrapolated_from_the_largest_batch_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher()
    manifest = make_manifest(teacher, "toy", "hash", PairsConfig(num=1000, batch=256))
    ran: list[int] = []

    def timed(teacher: object, manifest: object, batch: int) -> float:
        ran.append(batch)
        return 0.5 * batch

    monkeypatch.setattr(forecast_module, "run", timed)
    monkeypatch.setattr(forecast_module, "peak_bytes", lambda device: 1000 + 10 * ran[-1])
    told = forecast(teacher, manifest, patience_s=20.0)
    assert ran == [1, 1, 4, 16], "it stops once a batch takes a quarter of the patience"
    assert told.seconds == pytest.approx(500.0) and told.memory_bytes == 1000 + 10 * 256
    assert "extrapolated to the recipe's 256" in str(told)
    assert "extrapolated" not in str(dataclasses.replace(told, batch=16))
