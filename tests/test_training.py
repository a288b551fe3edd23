"""The training loop on a toy: it learns, and stopping anywhere leaves no trace."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tiny import L, make_teacher, seeded
from torch import Tensor, nn
from toy_training import CONFIG, TRUTH, Points, Toy, equal_states, killed_at, log_of, run

from ddecode.objectives.likelihood import LikelihoodObjective
from ddecode.run_folder import EMA, SUMS, sha256
from ddecode.training import Shown, batch_indices, learning_rate, parameter_groups, train, update_average
from ddecode.training_config import TrainingConfig


def test_the_loss_falls(tmp_path: Path) -> None:
    config = TrainingConfig(steps=150, batch=10, lr=0.05, warmup_steps=5, log_every=10, ema_decay=0.9)
    ema = run(tmp_path, config=config)
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(10, 151, 10))
    assert rows[-1]["loss"] < rows[0]["loss"] / 5
    assert set(rows[0]) == {"step", "loss", "error", "grad_norm", "lr"}
    points = Points()
    assert (ema(points.x)[:, 0] - points.x @ TRUTH).square().mean() < 0.1
    assert not any(p.requires_grad for p in ema.parameters())


@pytest.mark.parametrize("call", [3, 5, 8])
def test_a_resumed_run_equals_an_uninterrupted_one(call: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", killed_at(call))
    assert len(log_of(tmp_path / "parts")) == call
    resumed = run(tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert equal_states(whole, resumed)
    for name in ("model.safetensors", "ema.safetensors", "state.json"):
        a, b = (tmp_path / part / "checkpoint" / name for part in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes(), name


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", killed_at(2))
    assert equal_states(whole, run(tmp_path / "parts", resume=True))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_a_kill_between_the_renames_of_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", killed_at(5))
    (tmp_path / "parts" / "checkpoint").rename(tmp_path / "parts" / "checkpoint.old")
    samples = Points()
    assert equal_states(whole, run(tmp_path / "parts", samples, resume=True))
    assert samples.calls == 6, "steps 3 to 8, not all nine"


def test_a_torn_last_log_line_is_dropped(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", killed_at(4))
    log = tmp_path / "parts" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "lo')
    run(tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_a_finished_run_resumed_does_nothing(tmp_path: Path) -> None:
    ema, samples = run(tmp_path), Points()
    assert equal_states(ema, run(tmp_path, samples, resume=True))
    assert samples.calls == 0 and len(log_of(tmp_path)) == 9


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        run(tmp_path)
    with pytest.raises(ValueError, match="begun with another config"):
        run(tmp_path, resume=True, identity={"config": "b"})
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_run_of_a_network_of_other_parts_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    path, sums = checkpoint / EMA, checkpoint / SUMS
    state, before = load_file(path), sha256(path)
    state["new"] = state.pop(next(iter(state)))
    save_file(state, path)
    sums.write_text(sums.read_text().replace(before, sha256(path)))
    with pytest.raises(ValueError, match=r"ema\.safetensors is of another version of ddecode"):
        run(tmp_path, resume=True)


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    other = TrainingConfig(**{**CONFIG.__dict__, "seed": 6})
    assert not equal_states(run(tmp_path / "a"), run(tmp_path / "b", config=other))


def test_the_objective_is_told_how_far_the_run_is(tmp_path: Path) -> None:
    toy = Toy()
    train(toy, Points(), CONFIG, tmp_path, identity={}, show_progress=False)
    assert toy.progress == pytest.approx([step / 9 for step in range(9)])


def test_torchs_global_generator_is_not_touched(tmp_path: Path) -> None:
    toy = Toy()
    before = torch.get_rng_state()
    train(toy, Points(), CONFIG, tmp_path, identity={}, show_progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_runs_of_either_precision_follow_each_other_in_one_process(tmp_path: Path) -> None:
    for precision in ("no", "bf16", "no"):
        config = TrainingConfig(steps=2, batch=4, lr=0.05, precision=precision)
        ema = run(tmp_path / f"{precision}{len(list(tmp_path.iterdir()))}", config=config)
        assert next(ema.parameters()).dtype == torch.float32


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what `accelerate launch` would set."""

    def launch(**variables: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in variables.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)

    yield launch
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, launched: Callable[..., None]) -> None:
    whole, samples = run(tmp_path / "whole"), Points()
    launched(GRADIENT_ACCUMULATION_STEPS="2")
    parts = run(tmp_path / "parts", samples)
    assert samples.calls == 18
    for a, b in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b["grad_norm"] == pytest.approx(a["grad_norm"], 1e-4)
    for x, y in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_accelerates_bf16_is_the_recipes(tmp_path: Path, launched: Callable[..., None]) -> None:
    theirs = run(tmp_path / "theirs", config=dataclasses.replace(CONFIG, precision="bf16"))
    plain = run(tmp_path / "plain")
    launched(MIXED_PRECISION="bf16")
    ours = run(tmp_path / "ours")
    assert equal_states(ours, theirs) and not equal_states(ours, plain)
    with pytest.raises(ValueError, match="begun with another config"):
        run(tmp_path / "plain", resume=True)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("USE_FSDP", "true", "FSDP of version 1 is not supported"), ("MIXED_PRECISION", "fp16", "choose bf16 or no"),
     ("GRADIENT_ACCUMULATION_STEPS", "3", r"batch 4 does not divide over 1 processes and 3 steps of gradient acc")],
)  # fmt: skip
def test_what_training_does_not_do_is_refused(
    variable: str, value: str, message: str, tmp_path: Path, launched: Callable[..., None]
) -> None:
    launched(**{variable: value})
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    samples = Points()
    samples.x[:] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 1; begin anew with a lower training\.lr"):
        run(tmp_path, samples)


def test_previews_come_at_their_steps_with_the_average(tmp_path: Path) -> None:
    seen: list[int] = []
    config = TrainingConfig(**{**CONFIG.__dict__, "preview_every": 4})

    def preview(model: nn.Module, step: int) -> Shown:
        assert not model.training
        seen.append(step)
        return Shown(metrics={"measured": step / 2})

    run(tmp_path, config=config, preview=preview)
    assert seen == [4, 8]
    assert [row.get("measured") for row in log_of(tmp_path)] == [None, None, None, 2.0, None, None, None, 4.0, None]


@pytest.mark.parametrize(("size", "batch"), [(10, 5), (10, 3), (7, 7), (5, 12), (1, 3)])
def test_every_epoch_covers_every_sample_once(size: int, batch: int) -> None:
    steps = 3 * size
    order = [i for step in range(steps) for i in batch_indices(size, batch, step, seed=1)]
    assert len(order) == steps * batch
    epochs = [order[e * size : (e + 1) * size] for e in range(len(order) // size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 4:
        assert epochs[0] != epochs[1] and order != [
            i for step in range(steps) for i in batch_indices(size, batch, step, seed=2)
        ]


def test_the_learning_rate_warms_up_and_ends() -> None:
    config = TrainingConfig(steps=1000, batch=1, lr=2.0, warmup_steps=10, final_lr=0.5)
    assert [learning_rate(config, s) for s in (0, 4, 9)] == [0.2, 1.0, 2.0]
    assert learning_rate(config, 10) == 2.0
    assert learning_rate(config, 505) == pytest.approx(1.25)
    assert learning_rate(config, 999) == pytest.approx(0.5, abs=1e-4)
    rates = [learning_rate(config, s) for s in range(10, 1000)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(TrainingConfig(steps=10, batch=1, lr=1.0, warmup_steps=0), 0) == 1.0


def test_matrices_decay_and_vectors_do_not() -> None:
    toy = Toy()
    toy.model = torch.nn.ParameterDict(
        {"matrix": torch.ones(2, 3), "vector": torch.ones(3), "scales": torch.ones(1, 4, 1, 1), "one": torch.ones(1, 1)}
    )
    matrices, vectors = parameter_groups(toy, TrainingConfig(steps=1, batch=1, lr=0.1, weight_decay=0.5))[:2]
    assert [p.shape for p in matrices["params"]] == [(2, 3)] and matrices["weight_decay"] == 0.5
    assert sorted(p.numel() for p in vectors["params"]) == [1, 3, 4] and vectors["weight_decay"] == 0.0


@pytest.mark.parametrize(("step", "decay"), [(0, 1 / 10), (10, 11 / 20), (100000, 0.999)])
def test_the_average_is_its_formula(step: int, decay: float) -> None:
    average, model = nn.Linear(2, 1), nn.Linear(2, 1)
    expected = {n: decay * p + (1 - decay) * dict(model.named_parameters())[n] for n, p in average.named_parameters()}
    expected = {n: p.detach().clone() for n, p in expected.items()}
    update_average(average, model, step, 0.999)
    for name, parameter in average.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)


class Sequences:
    """Token sequences that follow their class."""

    def __len__(self) -> int:
        return 40

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(indices) % 4
        return (labels[:, None] + torch.arange(L)) % 32, labels


def test_a_teacher_learns_by_maximum_likelihood(tmp_path: Path) -> None:
    teacher = make_teacher()
    config = TrainingConfig(steps=40, batch=16, lr=5e-3, warmup_steps=5, log_every=1, save_every=40)
    train(LikelihoodObjective(teacher), Sequences(), config, tmp_path, identity={}, show_progress=False)
    rows = log_of(tmp_path)
    assert rows[-1]["cross_entropy"] < 0.5 * rows[0]["cross_entropy"]


def test_labels_are_dropped_at_their_rate() -> None:
    teacher = make_teacher()
    seen: list[Tensor] = []
    teacher.forward = lambda ids, labels: (seen.append(labels), torch.zeros(*ids.shape, 32))[1]  # type: ignore
    ids, labels = torch.zeros(4000, L, dtype=torch.int64), torch.arange(4000) % 4
    for rate in (0.0, 0.1, 1.0):
        LikelihoodObjective(teacher, label_drop=rate)(ids, labels, seeded(0))
        dropped = seen[-1] == teacher.num_classes
        assert torch.equal(seen[-1][~dropped], labels[~dropped])
        assert dropped.float().mean().item() == pytest.approx(rate, abs=0.02 if 0 < rate < 1 else 0)
