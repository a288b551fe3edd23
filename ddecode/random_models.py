"""Pipelines of published sizes with random weights: for speed, which does not depend on the values."""

import importlib
from collections.abc import Iterable
from typing import TypeVar

import torch

from ddecode.pipeline import DistilledPipeline
from ddecode.plan import SPAN
from ddecode.precision import cast, network
from ddecode.sampling import Model
from ddecode.student import Student
from ddecode.teacher import Teacher

SMALL, LIGHT = "small", "light"
"""What plans call the smallest published teacher of the same tokens, and a student of fewer layers."""


def random_pipeline(
    name: str,
    plans: Iterable[int | str],
    *,
    layers: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> DistilledPipeline:
    """A published teacher and what else these plans ask for, on the CPU.

    Args:
        name: such as var-d16.
        plans: numbers of student passes, `teacher`, or texts of plans, which may also name `small` and `light`.
        layers: of `light`; None is half of the teacher's.
        seed: of the weights.
        dtype: of the networks, each cast as soon as it is drawn, so that only one is in memory in fp32.

    Returns:
        A pipeline with the recipe that the teacher's authors sample it by.

    Raises:
        ValueError: there is no such architecture, or no such model of it.
    """
    published = importlib.import_module("third_party_loaders.published")
    architecture = published.find(name)
    asked = models_asked(plans)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = published.random_tokenizer(architecture, generator)
    teacher = in_dtype(published.random_teacher(architecture, tokenizer, generator), dtype)
    others: dict[str, Model] = {}
    if SMALL in asked:
        smallest = published.smallest(architecture)
        if smallest is None:
            raise ValueError(f"there is no smaller published teacher than {name} of the same tokens")
        others[SMALL] = in_dtype(published.random_teacher(smallest, tokenizer, generator), dtype)
    if LIGHT in asked:
        half = teacher.backbone.depth // 2
        light = published.random_student(teacher, generator, layers=half if layers is None else layers)
        others[LIGHT] = in_dtype(light, dtype)
    student = in_dtype(published.random_student(teacher, generator), dtype) if "student" in asked else None
    return DistilledPipeline(
        tokenizer=tokenizer, teacher=teacher, student=student, others=others, recipe=architecture.recipe
    )


ModelType = TypeVar("ModelType", Student, Teacher)


def in_dtype(model: ModelType, dtype: torch.dtype) -> ModelType:
    """The same model, its network cast."""
    cast(network(model), dtype)
    return model


def models_asked(plans: Iterable[int | str]) -> set[str]:
    """The names of the models that plans need."""
    asked: set[str] = set()
    for plan in plans:
        asked |= {match["who"] for match in SPAN.finditer(plan)} if isinstance(plan, str) else {"student"}
    return asked
