"""A toy to train: an objective, its samples, and runs of it that stop anywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import seeded
from torch import Tensor, nn

from ddecode.randomness import draw
from ddecode.training import Objective, train
from ddecode.training_config import TrainingConfig

CONFIG = TrainingConfig(steps=9, batch=4, lr=0.05, warmup_steps=2, weight_decay=0.1, log_every=1, save_every=3, seed=5)
TRUTH = torch.tensor([1.0, -2.0, 0.5])


class Toy(Objective):
    """Least squares on noisy inputs: its loss draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=seeded(parameter.numel())) / 2
        self.progress: list[float] = []

    def forward(
        self, x: Tensor, y: Tensor, generator: torch.Generator, progress: float = 0.0, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.progress.append(progress)
        x = x + 0.05 * draw(torch.randn, tuple(x.shape), generator)
        loss = (self.model(x)[:, 0] - y).square().mean()
        return loss, {"error": loss.detach().sqrt()}


class Points:
    """A training set; `before_batch` is called with the number of the call."""

    def __init__(self, before_batch: Callable[[int], None] = lambda call: None) -> None:
        self.x = torch.randn(30, 3, generator=seeded(0)) / 2
        self.before_batch, self.calls = before_batch, 0

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        self.before_batch(self.calls)
        self.calls += 1
        return self.x[indices], self.x[indices] @ TRUTH


def run(folder: Path, samples: Points | None = None, config: TrainingConfig = CONFIG, **options: Any) -> nn.Module:
    options = {"identity": {"config": "a"}, "show_progress": False} | options
    return train(Toy(), samples or Points(), config, folder, **options)


def killed_at(call: int) -> Points:
    def kill(now: int) -> None:
        if now == call:
            raise KeyboardInterrupt

    return Points(kill)


def log_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
