"""FSDP: two processes with half of all tensors each train as one does with all."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sharded import CONFIG, run
from tiny import make_dd2_student, make_draft_student, make_student, make_teacher, make_var_student, make_var_teacher

from ddecode.sharding import fsdp_options, units

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [
    "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "true",
    "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip


def scalars(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds" and np.isscalar(value)} for row in rows]


def assert_alike(ours: Path, theirs: Path, tolerance: float) -> None:
    """Two runs, in their logs and, but for what half precision rounds, in their averages."""
    rows, others = scalars(ours), scalars(theirs)
    assert [row["step"] for row in rows] == list(range(1, CONFIG.steps + 1))
    assert {"loss", "grad_norm"} <= rows[-1].keys()
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=tolerance)
    if tolerance <= 1e-4:
        a, b = (load_file(run / "checkpoint" / "ema.safetensors") for run in (ours, theirs))
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def test_two_processes_with_half_of_all_tensors_train_as_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "one")
    run(tmp_path / "one-half", precision="bf16")
    run(tmp_path / "one-drafting", kind="drafts")
    run(tmp_path / "one-wavefront", kind="wavefront")
    run(tmp_path / "one-score", kind="score")
    with suppress(KeyboardInterrupt):
        run(tmp_path / "arriving", stop=3)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, *LAUNCH, "tests/sharded.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    total = sum(tensor.nbytes for tensor in whole.values())
    held = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for kind in ("weights", "gradients", "moments", "average"):
        parts = [each[kind] for each in held]
        assert sum(parts) >= total and max(parts) < 0.55 * total, kind

    run(tmp_path / "leaving", resume=True)
    for folder in ("whole", "parts", "arriving", "leaving"):
        assert_alike(tmp_path / folder, tmp_path / "one", 1e-4)
    assert_alike(tmp_path / "drafting", tmp_path / "one-drafting", 1e-4)
    assert_alike(tmp_path / "wavefront", tmp_path / "one-wavefront", 1e-4)
    assert_alike(tmp_path / "score", tmp_path / "one-score", 1e-4)
    assert_alike(tmp_path / "half", tmp_path / "one-half", 1e-2)
    assert scalars(tmp_path / "half") != scalars(tmp_path / "whole")


def test_blocks_are_gathered_by_their_parts() -> None:
    """Blocks have methods that read weights outside of their pass: VAR's, what the class does to them."""
    teacher, var_teacher = make_teacher(), make_var_teacher()
    kinds = [make_student(teacher), make_draft_student(teacher), make_dd2_student(teacher)]
    assert [len(units(student)) for student in kinds] == [4, 4, 4], "attention and MLP of two blocks"
    kinds = [make_var_student(var_teacher), make_draft_student(var_teacher), make_dd2_student(var_teacher)]
    assert [len(units(student)) for student in kinds] == [6, 6, 6], "and their modulation"
    assert not units(make_student(teacher).requires_grad_(False))


@pytest.mark.parametrize(
    ("option", "message"),
    [("VERSION", "set fsdp_version to 2"), ("OFFLOAD_PARAMS", "set them to false"),
     ("ACTIVATION_CHECKPOINTING", "set them to false")],
)  # fmt: skip
def test_what_is_not_supported_of_fsdp_is_refused(option: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fsdp_options() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert fsdp_options() is not None
    monkeypatch.setenv(f"FSDP_{option}", "1" if option == "VERSION" else "true")
    with pytest.raises(ValueError, match=message):
        fsdp_options()
