"""The models of one pipeline: who may be among them, and what they have to share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddecode.arguments import check_kind, shown
from ddecode.plan import NAME, Plan
from ddecode.precision import dtype_of, network
from ddecode.sampling import Model, Skip
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher
from ddecode.trajectory import MappedTeacher
from ddecode.types import Tokenizer

OWN_NAMES = ("student", "teacher", "map", "skip")
"""What plans call a pipeline's own models, the teacher through its map, and the control."""


def check_members(
    tokenizer: Tokenizer, student: Student | None, teacher: Teacher | None, others: Mapping[str, Model]
) -> None:
    """
    Raises:
        ValueError: one is of another kind, has a name that plans cannot say, or has other tokens or classes.
    """
    if student is None and teacher is None:
        raise ValueError("a pipeline needs a student or a teacher")
    if isinstance(tokenizer, Teacher | Student) or not isinstance(getattr(tokenizer, "codebook_VC", None), Tensor):
        raise ValueError(f"a pipeline needs a tokenizer with its codebook, got {shown(tokenizer)}")
    check_kind("student", student, Student, type(None))
    check_kind("teacher", teacher, Teacher, type(None))
    for name, model in others.items():
        if name in OWN_NAMES:
            raise ValueError(f"plans mean another model by {name!r}; call yours otherwise")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"plans cannot say {name!r}; call your model by letters and digits")
        if not isinstance(model, Teacher | Student | Skip):
            raise ValueError(f"{name} must be a teacher or a student, got {shown(model)}")
    own: Any = student or teacher
    members: Mapping[str, Any] = {"student": student, "teacher": teacher, **others}
    for name, model in members.items():
        if not isinstance(model, Teacher | Student):  # absent, or the control
            continue
        if not same_codes(model.codebook_VC, tokenizer.codebook_VC):
            raise ValueError(f"{name} has another codebook, so its tokens mean something else here")
        for what in ("length", "num_classes"):
            ours, theirs = getattr(own, what), getattr(model, what)
            if ours != theirs:
                raise ValueError(f"{name} has {what} {theirs}, the pipeline's own model {ours}")


def named_models(
    student: Student | None, teacher: Teacher | None, others: Mapping[str, Model], length: int
) -> Mapping[str, Model]:
    """All that plans may name."""
    own: dict[str, Model] = {} if student is None else {"student": student}
    if teacher is not None:
        own |= {"teacher": teacher, "map": MappedTeacher(teacher)}
    return own | dict(others) | {"skip": Skip(length=length)}


def check_places(plan: Plan, models: Mapping[str, Model]) -> None:
    """
    Raises:
        ValueError: the networks that a plan names are not of one precision on one device.
    """
    named = {span.who: models.get(span.who) for span in plan.spans}
    present = {name: model for name, model in named.items() if isinstance(model, Teacher | Student)}
    places = {name: (dtype_of(network(model)), model.device) for name, model in present.items()}
    if len(set(places.values())) > 1:
        told = ", ".join(f"{name} {dtype} on {device}" for name, (dtype, device) in places.items())
        raise ValueError(f"models of one plan must be alike, these are {told}: bring all there by pipe.to")


def recipe_of(teacher: Teacher | None, others: Mapping[str, Model]) -> Recipe:
    """How a pipeline's teachers are sampled that is not told: as its own is, or where it has none, the others.

    Raises:
        ValueError: these are sampled differently.
    """
    teachers = {"teacher": teacher} if teacher is not None else others
    recipes = {name: model.recipe for name, model in teachers.items() if isinstance(model, Teacher)}
    if len(set(recipes.values())) > 1:
        raise ValueError(f"{', '.join(recipes)} are sampled differently: give DistilledPipeline a recipe for all")
    return next(iter(recipes.values()), Recipe())


def same_codes(first_VC: Tensor, second_VC: Tensor) -> bool:
    if first_VC is second_VC:
        return True
    return first_VC.shape == second_VC.shape and bool(torch.equal(first_VC.cpu(), second_VC.cpu()))
