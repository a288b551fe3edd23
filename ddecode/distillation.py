"""Distilling a teacher from its pairs: the recipe assembled.

The run folder holds `log.jsonl`, `checkpoint/` (to go on from) and the one before it, `previews/`, `tuning/` (the first
stage of a score term), `positives/` (tokens of the images of an adversarial term) and, in the end, `model/`: tokenizer,
teacher and student in our directory format.
"""

from pathlib import Path

from accelerate import PartialState
from torch import nn

from ddecode.checkpoint import ModelFolder, save_model, zoo_folder
from ddecode.config import DistillConfig, ScoreConfig, as_dict
from ddecode.evaluation.features import load_features
from ddecode.locks import held, meet
from ddecode.objectives.positives import LabelledImages, Positives, encode_images, read_positives
from ddecode.objectives.score import ARDiffusion, ScoreTerm, TuningObjective
from ddecode.objectives.student import StudentObjective
from ddecode.pairs import ForcedPairs, Pairs
from ddecode.previews import Preview
from ddecode.randomness import fresh_weights
from ddecode.student import Student
from ddecode.teacher import Teacher
from ddecode.training import Samples, train


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


def make_positives(teacher: Teacher, images: LabelledImages, folder: Path, *, show_progress: bool = True) -> Positives:
    """Tokens of real images, kept in the run's `folder` so that they are made once, by all processes together."""
    state = PartialState()
    rank, world = state.process_index, state.num_processes
    encode_images(images, teacher, folder, rank=rank, world=world, show_progress=show_progress)
    meet()
    return read_positives(images, folder)


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
        ValueError: pairs of another teacher or, for a drafting student, of another map; damaged shards or a damaged
            checkpoint; a run that is there already, or is at work there; a folder of images that does not fit.
        OSError: the disk is full, say. The last checkpoint is whole then.
    """
    with held(run, leader=PartialState().is_main_process):
        return distill_alone(config, pairs_folder, run, resume=resume, show_progress=show_progress)


def distill_alone(config: DistillConfig, pairs_folder: Path, run: Path, *, resume: bool, show_progress: bool) -> Path:
    """`distill`, where no other run is at work."""
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
    positives = None
    if objective.adversarial.weight and objective.adversarial.images is not None:
        images = LabelledImages.open(Path(objective.adversarial.images), teacher.num_classes)
        identity["images"] = images.hash()
        kept = run / "positives" / f"{identity['images']}-{identity['teacher']}"
        positives = make_positives(teacher, images, kept, show_progress=show_progress)
    score = None
    if objective.score.weight:
        score = make_score_term(
            teacher, pairs, objective.score, run / "tuning",
            seed=config.training.seed, identity=identity, resume=resume, show_progress=show_progress,
        )  # fmt: skip
    with fresh_weights(config.training.seed):
        weighted = StudentObjective(student, objective, features=features, score=score, positives=positives)
    samples: Samples = pairs
    if objective.uses_teacher_probabilities:
        samples = ForcedPairs(pairs, teacher, precision=config.training.precision, cache_gib=objective.cache_gib)
    preview = Preview(
        student, teacher, run / "previews", recipe=pairs.manifest.recipe, num_steps=made_with,
        seed=config.training.seed, guidance=None if score is None else score.guidance,
    )  # fmt: skip
    ema = train(
        weighted,
        samples,
        config.training,
        run,
        identity=identity,
        resume=resume,
        preview=preview,
        show_progress=show_progress,
    )
    assert isinstance(ema, Student)
    if PartialState().is_main_process:
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
