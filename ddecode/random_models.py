"""Pipelines of published sizes with random weights: for speed, which does not depend on the values."""

import importlib
from collections.abc import Iterable

import torch

from ddecode.pipeline import DistilledPipeline
from ddecode.plan import SPAN
from ddecode.sampling import Model

SMALL, LIGHT = "small", "light"
"""What plans call the smallest published teacher of the same tokens, and a student of fewer layers."""


def random_pipeline(
    name: str, plans: Iterable[int | str], *, layers: int | None = None, seed: int = 0
) -> DistilledPipeline:
    """A published teacher and what else these plans ask for, in fp32 on the CPU.

    Args:
        name: such as var-d16.
        plans: numbers of student passes, `teacher`, or texts of plans, which may also name `small` and `light`.
        layers: of `light`; None is half of the teacher's.
        seed: of the weights.

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
    teacher = published.random_teacher(architecture, tokenizer, generator)
    others: dict[str, Model] = {}
    if SMALL in asked:
        smallest = published.smallest(architecture)
        if smallest is None:
            raise ValueError(f"there is no smaller published teacher than {name} of the same tokens")
        others[SMALL] = published.random_teacher(smallest, tokenizer, generator)
    if LIGHT in asked:
        half = teacher.backbone.depth // 2
        others[LIGHT] = published.random_student(teacher, generator, layers=half if layers is None else layers)
    return DistilledPipeline(
        tokenizer=tokenizer,
        teacher=teacher,
        student=published.random_student(teacher, generator) if "student" in asked else None,
        others=others,
        recipe=architecture.recipe,
    )


def models_asked(plans: Iterable[int | str]) -> set[str]:
    """The names of the models that plans need."""
    asked: set[str] = set()
    for plan in plans:
        asked |= {match["who"] for match in SPAN.finditer(plan)} if isinstance(plan, str) else {"student"}
    return asked
