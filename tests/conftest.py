"""Fixtures that several files share; no test reaches the network."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_pipeline, make_scale_teacher, make_student, make_teacher, save_tiny
from upstream import State, make_states

from ddecode.pipeline import DistilledPipeline
from ddecode.student import Student
from ddecode.teacher import Teacher


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def teacher() -> Teacher:
    """Shared: do not change it."""
    return make_teacher()


@pytest.fixture(scope="session")
def scale_teacher() -> Teacher:
    """Several tokens a step. Shared: do not change it."""
    return make_scale_teacher()


@pytest.fixture(scope="session")
def student(teacher: Teacher) -> Student:
    """Starts 0 and 4, tokens before position 10 and continuous vectors after it. Shared: do not change it."""
    return make_student(teacher, split=10)


@pytest.fixture(scope="session")
def pipe() -> DistilledPipeline:
    """Shared: do not change it."""
    return make_pipeline()


@pytest.fixture(scope="session")
def model(pipe: DistilledPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipe` as a folder. Shared: do not change it."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", pipe)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """Of `model`, to be changed."""
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture(scope="session")
def states() -> dict[str, State]:
    """By kind, in upstream's layout. Shared: do not change it."""
    return make_states()


@pytest.fixture(scope="session")
def torchvision_loads() -> Iterator[None]:
    """torch-fidelity imports it. One built for CUDA does not load beside a torch for CPUs, for want of two operators
    that nothing here calls."""
    operators = torch.library.Library("torchvision", "DEF")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
