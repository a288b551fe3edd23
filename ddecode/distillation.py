"""Distilling a teacher from its pairs: the recipe assembled.

The run folder holds `log.jsonl`, `checkpoint/` (to go on from), `previews/`, `tuning/` (the first stage of a score
term) and, in the end, `model/`: tokenizer, teacher and student in our directory format.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from ddecode.checkpoint import ModelFolder, save_model, zoo_folder
from ddecode.config import DistillConfig, ScoreConfig, as_dict
from ddecode.evaluation.features import load_features
from ddecode.files import write_aside
from ddecode.images import grid, png
from ddecode.objectives.score import ARDiffusion, ScoreTerm, TuningObjective
from ddecode.objectives.student import StudentObjective
from ddecode.pairs import Pairs
from ddecode.pipeline import DistilledPipeline
from ddecode.randomness import fresh_weights, sample_generators
from ddecode.student import Student
from ddecode.teacher import Teacher
from ddecode.training import train


def make_student(folder: ModelFolder, teacher: Teacher, config: DistillConfig) -> Student:
    """A student of the recipe's shape with its first weights; the same for the same training seed.

    Raises:
        ValueError: `student.initial` names a model without a student, of another teacher or another shape.
    """
    shape, family = config.student, folder.family
    options: dict[str, object] = {"starts": shape.starts}
    if shape.drafts is None:
        options["split"] = teacher.length if shape.split is None else shape.split
    else:
        steps = {"num_steps": config.pairs.num_steps, "draft_steps": shape.draft_steps}
        options |= {"drafts": shape.drafts, "joins": shape.joins, **steps}
    sizes = family.student_config(teacher, shape.depth, drafting=shape.drafts is not None)
    with fresh_weights(config.training.seed):
        student: Student = family.build_student(sizes, teacher.tokenizer, None, **options)
        if shape.initial == "teacher":
            student.initialize_from(teacher)
    if shape.initial not in ("teacher", "random"):
        source = initial_model(config)
        assert source is not None
        source.require("student")
        if source.has("teacher") and source.teacher_hash() != folder.teacher_hash():
            raise ValueError(f"student.initial {shape.initial} has another teacher than {config.teacher}")
        state, ours = source.state("student"), student.state_dict()
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in ours.items()}:
            raise ValueError(f"the student of student.initial {shape.initial} has another shape than this recipe's")
        student.load_state_dict(state)
    return student.to(teacher.device)


def initial_model(config: DistillConfig) -> ModelFolder | None:
    """The model whose student this one goes on from, if any."""
    initial = config.student.initial
    return None if initial in ("teacher", "random") else ModelFolder.open(initial)


def make_score_term(
    teacher: Teacher,
    pairs: Pairs,
    config: ScoreConfig,
    run: Path,
    *,
    seed: int,
    identity: dict[str, object],
    resume: bool,
    show_progress: bool,
) -> ScoreTerm:
    """DD2's score term; its guidance network goes through the first stage in the folder `run`, if there is one."""
    with fresh_weights(seed):
        guidance: nn.Module = ARDiffusion.from_teacher(teacher)
    if config.tuning is not None:
        objective = TuningObjective(teacher, guidance, target=config.target, draws=config.guidance_draws)  # type: ignore[arg-type]
        guidance = train(
            objective, pairs, config.tuning, run, identity=identity, resume=resume, show_progress=show_progress
        )
        guidance.train().requires_grad_(True)
    assert isinstance(guidance, ARDiffusion)
    return ScoreTerm(teacher, guidance, form=config.form, draws=config.draws, guidance_draws=config.guidance_draws)


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
        ValueError: pairs of another teacher or, for a drafting student, of another map; damaged shards; or a run that
            is there already.
    """
    folder = ModelFolder.open(config.teacher)
    pairs = Pairs(pairs_folder, teacher_hash=folder.teacher_hash())
    made_with, told = pairs.manifest.num_steps, config.pairs.num_steps
    if config.student.drafts is not None and made_with != told:
        raise ValueError(
            f"{pairs_folder} was made with {made_with} evaluations of the map, and a drafting student makes its tokens "
            f"with the recipe's pairs.num_steps, {told}: set it to {made_with}"
        )
    teacher = folder.teacher().to(PartialState().device)
    student = make_student(folder, teacher, config)
    freeze(teacher.backbone, teacher.tokenizer)
    objective = config.objective
    features = load_features(features_folder(objective.features)) if objective.uses_images else None
    initial = initial_model(config)
    identity: dict[str, object] = {
        "config": {key: value for key, value in as_dict(config).items() if key != "expected"},
        "teacher": folder.teacher_hash(),
        "initial": None if initial is None else initial.weights_hash("student"),
        "pairs": len(pairs),
    }
    score = None
    if objective.score.weight:
        score = make_score_term(
            teacher, pairs, objective.score, run / "tuning",
            seed=config.training.seed, identity=identity, resume=resume, show_progress=show_progress,
        )  # fmt: skip
    with fresh_weights(config.training.seed):
        weighted = StudentObjective(student, objective, features=features, score=score)
    ema = train(
        weighted,
        pairs,
        config.training,
        run,
        identity=identity,
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
    group = {"backbone": backbone, **student.options()}
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
