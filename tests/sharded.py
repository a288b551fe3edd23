"""Train a tiny student in the processes of a launch: to its end, stopped and resumed, and in half precision.

accelerate launch --use_fsdp ... tests/sharded.py FOLDER, where the run FOLDER/arriving was stopped elsewhere
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tiny import (
    C,
    V,
    make_draft_student,
    make_student,
    make_teacher,
    make_var_teacher,
    make_wavefront_student,
    seeded,
)
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ddecode import training
from ddecode.objective_config import ObjectiveConfig, ScoreConfig
from ddecode.objectives.guidance import TokenGuidance
from ddecode.objectives.score import ScoreTerm
from ddecode.objectives.student import StudentObjective
from ddecode.processes import rank
from ddecode.student import Student
from ddecode.training_config import TrainingConfig

CONFIG = TrainingConfig(
    steps=6, batch=4, lr=0.01, warmup_steps=2, weight_decay=0.1, clip_norm=0.5, log_every=1, save_every=2
)


class Sequences:
    """A training set. `stop` is the number of the batch that it does not give."""

    def __init__(self, length: int, stop: int | None) -> None:
        self.noise_NLC = torch.randn(12, length, C, generator=seeded(0))
        self.ids_NL = torch.randint(V, (12, length), generator=seeded(1))
        self.stop, self.calls = stop, 0

    def __len__(self) -> int:
        return len(self.ids_NL)

    def batch(self, indices: list[int]) -> tuple[Tensor, ...]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return self.noise_NLC[indices], self.ids_NL[indices], torch.tensor(indices) % 4


STUDENTS: dict[str, Callable[[], Student]] = {
    "dd1": lambda: make_student(make_teacher(), split=10),
    "drafts": lambda: make_draft_student(make_var_teacher()),
    "wavefront": lambda: make_wavefront_student(make_teacher()),
    "score": lambda: make_wavefront_student(make_teacher()),
}


def run(
    folder: Path, *, kind: str = "dd1", precision: str = "no", stop: int | None = None, resume: bool = False
) -> dict[str, Tensor]:
    """A training of a student; returns the state of its EMA."""
    student = STUDENTS[kind]()
    terms, score = ObjectiveConfig(logits=1.0, embeddings=0.5, teacher_forcing=kind == "wavefront"), None
    if kind == "score":
        teacher = make_teacher()
        score = ScoreTerm(teacher, TokenGuidance.from_teacher(teacher, passes=len(student.passes)))
        term = ScoreConfig(weight=1.0, guidance="tokens", updates=2)
        terms = dataclasses.replace(terms, score=term, own_prefix=0.5, image_batch=4)
    objective = StudentObjective(student, terms, score=score)
    config = dataclasses.replace(CONFIG, precision=precision)
    samples = Sequences(student.length, stop)
    ema = training.train(objective, samples, config, folder, identity={}, resume=resume, show_progress=False)
    return ema.state_dict()


def size(tensors: list[Tensor]) -> int:
    """The bytes of memory that they take here."""
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held() -> dict[str, int]:
    """Filled by every step: the bytes of each kind that this process holds."""
    found: dict[str, int] = {}
    update = training.update_average

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found["weights"] = size(parameters)
        found["gradients"] = size([p.grad for p in parameters if p.grad is not None])
        found["moments"] = size([state["exp_avg_sq"] for state in optimizer.state.values() if state])

    def counted(average: torch.nn.Module, *others: Any) -> None:
        update(average, *others)
        found["average"] = size(list(average.parameters()))

    training.update_average = counted
    register_optimizer_step_post_hook(count)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, found = Path(sys.argv[1]), held()
    whole = run(out / "whole")
    (out / f"{rank()}.json").write_text(json.dumps(found))
    for folder in ("parts", "leaving"):
        with suppress(KeyboardInterrupt):
            run(out / folder, stop=3)
    resumed = run(out / "parts", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole), "resumed is not as uninterrupted"
    run(out / "arriving", resume=True)
    run(out / "half", precision="bf16")
    run(out / "drafting", kind="drafts")
    run(out / "wavefront", kind="wavefront")
    run(out / "score", kind="score")
