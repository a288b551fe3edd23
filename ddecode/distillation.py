"""Distilling a teacher from its pairs: the recipe assembled.

The run folder holds `log.jsonl`, `checkpoint/` (to go on from) and the one before it, `previews/`, `tuning/` (the first
stage of a score term), `positives/` (tokens of the images of an adversarial term), what `training.report_to` keeps and,
in the end, `model/`: tokenizer, teacher and student in our directory format, with the recipe.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ddecode.checkpoint import RECIPE, ModelFolder, save_model
from ddecode.compilation import compile_blocks
from ddecode.config import WITHOUT_MODEL, DistillConfig, as_dict, as_yaml, chosen
from ddecode.dd2_student import HEAD_DEPTH, DD2Student
from ddecode.evaluation.features import FeatureNetwork, Features, features_folder, load_image_features
from ddecode.files import read_tensors, write_aside
from ddecode.labelled_images import LabelledImages
from ddecode.locks import held
from ddecode.objectives.guidance import ARDiffusion, Guidance, TokenGuidance
from ddecode.objectives.matching import TokenMatching
from ddecode.objectives.positives import Positives, encode_images, read_positives
from ddecode.objectives.score import ScoreTerm
from ddecode.objectives.student import StudentObjective
from ddecode.objectives.tuning import TuningObjective
from ddecode.pairs import ForcedPairs, Pairs
from ddecode.previews import Preview
from ddecode.processes import launch, meet, rank
from ddecode.randomness import fresh_weights
from ddecode.reporters import check_reporters
from ddecode.run_folder import CRITICS, EMA, Checkpoint, check_new, found_checkpoint, sha256
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
    if shape.diffusion_head is not None:
        options |= {"head_depth": shape.diffusion_head, "noise_level": shape.noise_level}
    elif shape.drafts is not None:
        steps = {"num_steps": config.pairs.num_steps, "draft_steps": shape.draft_steps}
        options |= {"drafts": shape.drafts, "joins": shape.joins, **steps}
    elif shape.exits is not None:
        options |= {"exits": shape.exits, "joins": shape.joins, "num_steps": shape.draft_steps}
    elif shape.wavefront is not None:
        options |= {"wavefront": shape.wavefront, "num_steps": shape.draft_steps}
    else:
        options["split"] = teacher.length if shape.split is None else shape.split
    shifted = shape.mapped or shape.diffusion_head is not None
    sizes = family.student_config(teacher, shape.depth, shifted=shifted)
    with fresh_weights(config.training.seed):
        student: Student = family.build_student(sizes, teacher.tokenizer, None, **options)
        if shape.initial == "teacher":
            student.initialize_from(teacher)
    if shape.initial not in WITHOUT_MODEL:
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
    return None if initial in WITHOUT_MODEL else ModelFolder.open(initial)


def make_score_term(
    teacher: Teacher,
    student: Student,
    pairs: Pairs,
    recipe: DistillConfig,
    run: Path,
    *,
    identity: dict[str, object],
    resume: bool,
    show_progress: bool,
) -> ScoreTerm:
    """DD2's score term, of the teacher as the pairs have it; its guidance network goes through the first stage in the
    folder `run`, if there is one.

    Raises:
        ValueError: it is to learn tokens, and the student emits vectors somewhere.
    """
    config, guidance = recipe.objective.score, make_guidance(teacher, student, recipe)
    if config.tuning is not None:
        assert isinstance(guidance, ARDiffusion)
        objective = TuningObjective(
            teacher, guidance, recipe=pairs.recipe, target=config.target, draws=config.guidance_draws
        )
        guidance = train(
            objective, pairs, config.tuning, run, identity=identity, resume=resume, show_progress=show_progress
        )
        guidance.train().requires_grad_(True)
    if recipe.training.compile:
        compile_blocks(guidance)
    assert isinstance(guidance, Guidance)
    return ScoreTerm(
        teacher,
        guidance,
        recipe=pairs.recipe,
        form=config.form,
        draws=config.draws,
        guidance_draws=config.guidance_draws,
    )


def make_guidance(teacher: Teacher, student: Student, recipe: DistillConfig) -> nn.Module:
    """The score term's guidance network as it is before any stage."""
    config = recipe.objective.score
    if config.guidance == "tokens" and student.split < student.length:
        raise ValueError(
            f"objective.score.guidance: tokens is for students that emit tokens at all positions; this one's are "
            f"vectors from student.split {student.split} on"
        )
    guidance: nn.Module
    with fresh_weights(recipe.training.seed):
        if config.guidance == "tokens":
            guidance = TokenGuidance.from_teacher(teacher, passes=len(student.passes))
        else:
            depth = recipe.student.diffusion_head or HEAD_DEPTH
            guidance = ARDiffusion.from_teacher(teacher, passes=len(student.passes), depth=depth)
    if config.initial != "teacher":
        take_over(guidance, "objective.score", config.initial)
    return guidance


def make_matching_term(teacher: Teacher, student: Student, pairs: Pairs, config: DistillConfig) -> TokenMatching:
    """The token-matching term, of the teacher as the pairs have it, with its guidance network as that begins.

    Raises:
        ValueError: `objective.matching.initial` is no run with a guidance network of this shape, or is damaged.
    """
    term = config.objective.matching
    with fresh_weights(config.training.seed):
        guidance = TokenGuidance.from_teacher(teacher, passes=len(student.passes))
    if term.initial != "teacher":
        take_over(guidance, "objective.matching", term.initial)
    if config.training.compile:
        compile_blocks(guidance)
    return TokenMatching(teacher, guidance, recipe=pairs.recipe, temperature=term.temperature, clip=term.clip)


GUIDANCE = {"objective.score": "guidance.", "objective.matching": "token_guidance."}
"""What the names of each term's guidance network begin with among a run's critics."""
PASSES = "passes.weight"
"""In its state, one vector for each kind of pass."""


def take_over(guidance: nn.Module, term: str, initial: str) -> None:
    """Give a guidance network the weights of an earlier run's; what tells passes apart begins anew if that run's
    student made more or fewer kinds of them.

    Raises:
        ValueError: the folder `initial` is no run with one of this shape, or is damaged.
    """
    path = guidance_file(term, initial)
    state = read_tensors(path, GUIDANCE[term] if path.name == CRITICS else "")
    ours = guidance.state_dict()
    if PASSES not in state or len(state[PASSES]) != len(ours[PASSES]):  # of passes between other starts
        state[PASSES] = ours[PASSES]
    if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in ours.items()}:
        raise ValueError(f"{term}.initial {initial} has no guidance network of this recipe's shape")
    guidance.load_state_dict(state)


def guidance_file(term: str, initial: str) -> Path:
    """Where the run `initial` keeps the term's guidance network, checked against its checksum: among its critics, or,
    if it is the first stage of a score term, as its model."""
    last = Checkpoint(Path(initial))
    name = EMA if term == "objective.score" and not (last.folder / CRITICS).is_file() else CRITICS
    if not (last.folder / name).is_file():
        raise ValueError(
            f"{term}.initial {initial} is neither teacher nor the folder of a run with {term}: it has no "
            f"{last.folder.name}/{name}"
        )
    return last.checked(name)


def image_features(teacher: Teacher, name: str) -> Features:
    """The network of image terms.

    Raises:
        ValueError: there is none, or it is a bundled one, of images of other classes than the teacher's.
    """
    folder = features_folder(name)
    network = load_image_features(folder)
    bundled = folder != Path(name)
    if bundled and isinstance(network, FeatureNetwork) and network.num_classes != teacher.num_classes:
        raise ValueError(
            f"objective.features: {name} tells {network.num_classes} classes of small images apart, and the teacher "
            f"has {teacher.num_classes}: name a folder of ddecode train or one of LPIPS's files (docs/recipes.md)"
        )
    return network


def make_positives(teacher: Teacher, images: LabelledImages, folder: Path, *, show_progress: bool = True) -> Positives:
    """Tokens of real images, kept in the run's `folder` so that they are made once, by all processes together."""
    encode_images(images, teacher, folder, show_progress=show_progress)
    meet()
    return read_positives(images, folder)


def freeze(*parts: object) -> None:
    for part in parts:
        if isinstance(part, nn.Module):
            part.requires_grad_(False)


def distill(
    config: DistillConfig, pairs_folder: Path, run: Path, *, resume: bool = False, show_progress: bool = True
) -> Path:
    """Train a student on pairs and write the model folder.

    Args:
        config: the recipe. Where it asks for other pairs, the model's tells of those that were used.
        pairs_folder: made by `ddecode pairs` from the same teacher.
        run: the run's folder.
        resume: go on from its checkpoint, with the pairs that it was begun with if there are more by now.

    Returns:
        The model folder, `run/model`.

    Raises:
        ValueError: pairs of another teacher or, for a drafting student, of another map; damaged shards or a damaged
            checkpoint; a run that is there already, or is at work there; a folder of images that does not fit; a
            library of `training.report_to` that is missing.
        OSError: the disk is full, say. The last checkpoint is whole then.
    """
    for stage in (config.training, config.objective.score.tuning):
        check_reporters(() if stage is None else stage.report_to)
    with held(run):
        return distill_alone(config, pairs_folder, run, resume=resume, show_progress=show_progress)


def distill_alone(config: DistillConfig, pairs_folder: Path, run: Path, *, resume: bool, show_progress: bool) -> Path:
    """`distill`, where no other run is at work."""
    check_new(run, resume=resume)
    folder = ModelFolder.open(config.teacher)
    teacher_hash = folder.teacher_hash()
    pairs = Pairs(pairs_folder, teacher_hash=teacher_hash, num=pairs_begun_with(run) if resume else None)
    made_with, told = pairs.manifest.num_steps, config.pairs.num_steps
    if config.student.drafts is not None and made_with != told:
        raise ValueError(
            f"{pairs_folder} was made with {made_with} evaluations of the map, and a drafting student makes its tokens "
            f"with the recipe's pairs.num_steps, {told}: set it to {made_with}"
        )
    teacher = folder.teacher().to(launch().device)
    if pairs.shape != (teacher.length, teacher.codebook_VC.shape[1], teacher.num_classes):
        raise ValueError(f"{pairs_folder / 'manifest.json'} is damaged: its sizes are not the teacher's")
    config = replace(config, pairs=pairs.manifest.as_config(teacher.recipe))  # those used, whatever it asked for
    student = make_student(folder, teacher, config)
    freeze(teacher.backbone, teacher.tokenizer)
    objective = config.objective
    features = image_features(teacher, objective.features) if objective.uses_images else None
    initial = initial_model(config)
    identity: dict[str, object] = {
        "config": chosen(config),
        "teacher": teacher_hash,
        "initial": None if initial is None else initial.weights_hash("student"),
        "pairs": len(pairs),
    }
    for name, term in (("score", objective.score), ("matching", objective.matching)):
        if term.weight and term.initial != "teacher":
            identity[f"{name}.initial"] = sha256(guidance_file(f"objective.{name}", term.initial))
    positives = None
    if objective.adversarial.weight and objective.adversarial.images is not None:
        images = LabelledImages.open(Path(objective.adversarial.images), teacher.num_classes)
        identity["images"] = images.hash()
        kept = run / "positives" / f"{identity['images']}-{identity['teacher']}"
        positives = make_positives(teacher, images, kept, show_progress=show_progress)
    score = None
    if objective.score.weight:
        score = make_score_term(
            teacher, student, pairs, config, run / "tuning",
            identity=identity, resume=resume, show_progress=show_progress,
        )  # fmt: skip
        if config.student.initial == "tuning":
            assert isinstance(student, DD2Student) and isinstance(score.guidance, ARDiffusion)
            student.initialize_from_tuned(module(score.guidance.backbone), score.guidance.head)
    matching = make_matching_term(teacher, student, pairs, config) if objective.matching.weight else None
    with fresh_weights(config.training.seed):
        weighted = StudentObjective(
            student, objective, features=features, score=score, matching=matching, positives=positives
        )
    samples: Samples = pairs
    if objective.uses_teacher_probabilities:
        samples = ForcedPairs(pairs, teacher, precision=config.training.precision, cache_gib=objective.cache_gib)
    preview = Preview(
        student, teacher, run / "previews", recipe=pairs.manifest.recipe, num_steps=made_with,
        seed=config.training.seed, guidance=None if score is None else score.guidance,
        teacher_forcing=objective.teacher_forcing,
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
    if initial is not None and config.student.initial_share:
        draw_back(ema, initial.state("student"), config.student.initial_share)
    if rank() == 0:
        save_model(run / "model", model_config(folder, ema, config), {
            "tokenizer": module(teacher.tokenizer), "teacher": module(teacher.backbone), "student": ema,
        })  # fmt: skip
        write_aside(run / "model" / RECIPE, as_yaml(config).encode())
    return run / "model"


def pairs_begun_with(run: Path) -> int | None:
    """The number of pairs that a run goes on with, though there may be more by now; None: it has not begun."""
    for stage in (run, run / "tuning"):
        checkpoint = found_checkpoint(stage)
        if checkpoint.exists():
            return checkpoint.state()["identity"].get("pairs")
    return None


@torch.no_grad()
def draw_back(student: Student, state: dict[str, Tensor], share: float) -> None:
    """Move its weights that share of the way to those of `state`."""
    for name, weight in student.state_dict().items():
        weight.lerp_(state[name].to(weight), share)


def module(part: object) -> nn.Module:
    assert isinstance(part, nn.Module)
    return part


def model_config(folder: ModelFolder, student: Student, config: DistillConfig) -> dict[str, object]:
    """The teacher's `config.json` with the student's group put in, and the teacher sampled as its pairs were."""
    tree = {key: value for key, value in folder.config.items() if key != "format"}
    if config.pairs.recipe is not None:
        tree["teacher"] = tree["teacher"] | {"recipe": as_dict(config.pairs.recipe)}
    return tree | {"student": {"backbone": as_dict(student.backbone.config), **student.options()}}
