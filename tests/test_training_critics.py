"""Critics in the training loop, on a toy: networks that learn beside the model, at steps and rates of their own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_training import CONFIG, Points, Toy, equal_states, killed_at, log_of

from ddecode.training import parameter_groups, train


class Duel(Toy):
    """A critic estimates the model's error; every third step it learns alone, and once the model goes back to its
    EMA."""

    def __init__(self) -> None:
        super().__init__()
        self.critics["guess"] = nn.Linear(3, 1)
        for parameter in self.critics.parameters():
            parameter.data.zero_()
        self.critic_lr["guess"] = 0.02

    def realigns(self, step: int, progress: float) -> bool:
        return step == 5

    def forward(
        self, x: Tensor, y: Tensor, generator: torch.Generator, progress: float = 0.0, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().forward(x, y, generator, progress, step)
        critic_loss = (self.critics["guess"](x)[:, 0] - metrics["error"]).square().mean()
        metrics["error_B"] = metrics["error"].expand(2)
        return (critic_loss, metrics) if step % 3 == 2 else (loss + critic_loss, metrics)


def test_a_resumed_run_with_a_critic_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"identity": {}, "show_progress": False}
    whole = train(Duel(), Points(), CONFIG, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(Duel(), killed_at(5), CONFIG, tmp_path / "parts", **options)
    again = Duel()
    resumed = train(again, Points(), CONFIG, tmp_path / "parts", resume=True, **options)
    assert equal_states(whole, resumed)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    for name in ("model.safetensors", "ema.safetensors", "critics.safetensors"):
        a, b = (tmp_path / part / "checkpoint" / name for part in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes(), name
    assert all(p.abs().max() > 0 for p in again.critics.parameters())


def test_a_critics_own_step_moves_neither_the_model_nor_its_average(tmp_path: Path) -> None:
    def states(steps: int) -> list[bytes]:
        config = dataclasses.replace(CONFIG, steps=9, save_every=steps)
        folder = tmp_path / str(steps)
        with pytest.raises(KeyboardInterrupt):
            train(Duel(), killed_at(steps), config, folder, identity={}, show_progress=False)
        return [(folder / "checkpoint" / f"{n}.safetensors").read_bytes() for n in ("model", "ema", "critics")]

    before, after = states(2), states(3)
    assert before[:2] == after[:2], "step 3 is the critic's own"
    assert before[2] != after[2]


def test_a_critic_keeps_its_learning_rate_and_the_log_its_vectors(tmp_path: Path) -> None:
    objective = Duel()
    groups = parameter_groups(objective, CONFIG)
    assert [g["critic"] for g in groups] == [False, False, True] and groups[2]["peak_lr"] == 0.02
    train(objective, Points(), CONFIG, tmp_path, identity={}, show_progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(isinstance(row["error_B"], list) and len(row["error_B"]) == 2 for row in rows)
    assert [row["grad_norm"] is None for row in rows] == [False, False, True] * 3


def test_each_network_is_clipped_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, clipped = Duel(), []
    objective.critics["second"] = nn.Linear(2, 1)
    objective.critic_lr["second"] = 0.1
    clip = Accelerator.clip_grad_norm_

    def recorded(self: Accelerator, parameters: list[nn.Parameter], *options: Any) -> Any:
        clipped.append({id(parameter) for parameter in parameters})
        return clip(self, parameters, *options)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", recorded)
    forward = Duel.forward

    def with_second(self: Duel, *arguments: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = forward(self, *arguments, **options)
        return loss + self.critics["second"](torch.ones(2)).sum(), metrics

    monkeypatch.setattr(Duel, "forward", with_second)
    train(objective, Points(), dataclasses.replace(CONFIG, steps=1), tmp_path, identity={}, show_progress=False)
    networks = (objective.model, objective.critics["guess"], objective.critics["second"])
    assert clipped == [{id(parameter) for parameter in network.parameters()} for network in networks]


def test_the_model_goes_back_to_its_average_when_the_objective_says_so(tmp_path: Path) -> None:
    """With a learning rate of next to nothing after it, the two are equal."""
    config = dataclasses.replace(CONFIG, steps=6, ema_decay=0.9)
    run_states = {}
    for name, kind in (("duel", Duel), ("toy", Toy)):
        train(kind(), Points(), config, tmp_path / name, identity={}, show_progress=False)
        folder = tmp_path / name / "checkpoint"
        run_states[name] = [load_file(folder / f"{n}.safetensors") for n in ("model", "ema")]
    gaps = {
        name: sum((model[k] - ema[k]).abs().sum().item() for k in model) for name, (model, ema) in run_states.items()
    }
    assert gaps["duel"] < 1e-6 < gaps["toy"], "step 5 went back, and was the critic's own"
