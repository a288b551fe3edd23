"""Distilling a teacher from its pairs: the recipe assembled.

The run folder holds `log.jsonl`, `checkpoint/` (to go on from), `previews/` and, in the end, `model/`: tokenizer,
teacher and student in our directory format.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from ddecode.checkpoint import ModelFolder, save_model, zoo_folder
from ddecode.config import DistillConfig, as_dict
from ddecode.evaluation.features import load_features
from ddecode.files import write_aside
from ddecode.images import grid, png
from ddecode.objectives.regression import RegressionObjective
from ddecode.pairs import Pairs
from ddecode.pipeline import DistilledPipeline
from ddecode.randomness import sample_generators
from ddecode.student import Student
from ddecode.teacher import Teacher
from ddecode.training import train


def make_student(folder: ModelFolder, teacher: Teacher, config: DistillConfig) -> Student:
    """A student of the recipe's shape, initialised from the teacher; the same for the same training seed."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(config.training.seed)
    student = folder.family.build_student(
        folder.family.student_config(teacher, config.student.depth),
        teacher.tokenizer,
        None,
        starts=config.student.starts,
        split=teacher.length if config.student.split is None else config.student.split,
    )
    torch.set_rng_state(torch_state)
    student.to(teacher.device).initialize_from(teacher)
    return student


def features_folder(name: str) -> Path:
    """A bundled feature network's folder, or the folder named."""
    bundled = zoo_folder() / "features" / name
    return bundled if bundled.is_dir() else Path(name)


def freeze(*parts: object) -> None:
    for part in parts:
        if isinstance(part, nn.Module):
            part.requires_grad_(False)


def distill(
    config: DistillConfig, pairs_folder: Path, run: Path, *, resume: bool = False, show_progress: bool = True
) -> Path:
    """Train a student on pairs and write the model folder.

    Args:
        config: the recipe.
        pairs_folder: made by `ddecode pairs` from the same teacher.
        run: the run's folder.
        resume: go on from its checkpoint.

    Returns:
        The model folder, `run/model`.

    Raises:
        ValueError: pairs of another teacher, damaged shards, or a run that is there already.
    """
    folder = ModelFolder.open(config.teacher)
    pairs = Pairs(pairs_folder, teacher_hash=folder.teacher_hash())
    teacher = folder.teacher().to(PartialState().device)
    student = make_student(folder, teacher, config)
    freeze(teacher.backbone, teacher.tokenizer)
    objective = config.objective
    features = load_features(features_folder(objective.features)) if objective.uses_images else None
    ema = train(
        RegressionObjective(student, features, objective),
        pairs,
        config.training,
        run,
        identity={
            "config": {key: value for key, value in as_dict(config).items() if key != "expected"},
            "teacher": folder.teacher_hash(),
            "pairs": len(pairs),
        },
        resume=resume,
        preview=lambda model, step: write_preview(model, teacher, run / "previews" / f"{step:07d}.png"),
        show_progress=show_progress,
    )
    assert isinstance(ema, Student)
    save_model(run / "model", model_config(folder, ema, config), {
        "tokenizer": module(teacher.tokenizer), "teacher": module(teacher.backbone), "student": ema,
    })  # fmt: skip
    return run / "model"


def module(part: object) -> nn.Module:
    assert isinstance(part, nn.Module)
    return part


def model_config(folder: ModelFolder, student: Student, config: DistillConfig) -> dict[str, object]:
    """The teacher's `config.json` with the student's group put in."""
    backbone = as_dict(student.backbone.config)
    group = {"backbone": backbone, "starts": student.starts, "split": student.split}
    return {k: v for k, v in folder.config.items() if k != "format"} | {"student": group}


@torch.no_grad()
def write_preview(student: nn.Module, teacher: Teacher, path: Path, rows: int = 4) -> None:
    """A grid of one-step samples: `rows` of each class, a column each."""
    assert isinstance(student, Student)
    pipe = DistilledPipeline(tokenizer=teacher.tokenizer, student=student)
    labels = [i % pipe.num_classes for i in range(rows * min(pipe.num_classes, 16))]
    output = pipe(labels, generator=sample_generators(0, range(len(labels))), output_type="np")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, png(grid(np.asarray(output.images), columns=min(pipe.num_classes, 16), scale=2)))
