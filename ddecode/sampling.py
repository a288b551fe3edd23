"""Executing a plan: noise and labels in, token embeddings out.

B batch, L token positions, C code width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.plan import Plan, Span, check_plan
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher, inverse_cdf


@dataclass(frozen=True, kw_only=True)
class Skip:
    """The control that leaves the rest out: it emits zero vectors, at no cost."""

    length: int


Model = Teacher | Student | Skip


@dataclass(kw_only=True)
class Progress:
    """A sequence on its way: the first `resolved` positions of `embeddings_BLC` are emitted, the rest is unset."""

    embeddings_BLC: Tensor
    resolved: int = 0
    network_evaluations: int = field(default=0)


@torch.no_grad()
def execute(
    plan: Plan,
    models: Mapping[str, Model],
    *,
    noise_BLC: Tensor,
    uniforms_BL: Tensor,
    labels: Any,
    recipe: Recipe,
) -> Progress:
    """Run every span of a plan.

    Args:
        plan: see `ddecode.plan`.
        models: the models it names.
        noise_BLC: standard normal fp32; a student's pass reads it at all positions it has not resolved.
        uniforms_BL: fp32 in [0, 1); a teacher's span draws its tokens with them.
        labels: checked class labels [B].
        recipe: guidance and filtering of teacher spans.

    Raises:
        ValueError: see `check_models`.
    """
    check_models(plan, models)
    progress = Progress(embeddings_BLC=torch.empty_like(noise_BLC))
    for span in plan.spans:
        model = models[span.who]
        if isinstance(model, Skip):
            progress.embeddings_BLC[:, span.start : span.stop] = 0
        elif isinstance(model, Student):
            emit_with_student(model, span, progress, noise_BLC, labels)
        else:
            emit_with_teacher(model, span, progress, uniforms_BL, labels, recipe)
        progress.resolved = span.stop
        progress.network_evaluations += passes(model, span)
    return progress


def check_models(plan: Plan, models: Mapping[str, Model]) -> None:
    """Refuse a plan that these models cannot execute.

    Raises:
        ValueError: it is for another length, names an unknown model or start, or cuts a teacher's step.
    """
    check_plan(plan, known_starts(models))
    for span in plan.spans:
        model = models[span.who]
        if model.length != plan.length:
            raise ValueError(f"the plan is for {plan.length} tokens, {span.who} has {model.length}")
        passes(model, span)


def known_starts(models: Mapping[str, Model]) -> dict[str, tuple[int, ...] | None]:
    """By model name, where its spans may start: a student's trained starts, anywhere for the others."""
    return {name: model.starts if isinstance(model, Student) else None for name, model in models.items()}


def passes(model: Model, span: Span) -> int:
    """Sequential passes of the network in one span."""
    if isinstance(model, Teacher):
        return model.step_at(span.stop) - model.step_at(span.start)
    return 1 if isinstance(model, Student) else 0


def emit_with_student(student: Student, span: Span, progress: Progress, noise_BLC: Tensor, labels_B: Tensor) -> None:
    """One pass from the kept tokens and the original noise after them."""
    sequence_BLC = torch.cat([progress.embeddings_BLC[:, : span.start], noise_BLC[:, span.start :]], 1)
    emitted = student.emit(sequence_BLC, labels_B, span.start, span.stop)
    progress.embeddings_BLC[:, span.start : span.stop] = emitted.to(noise_BLC.dtype)


def emit_with_teacher(
    teacher: Teacher, span: Span, progress: Progress, uniforms_BL: Tensor, labels: Any, recipe: Recipe
) -> None:
    """AR steps after the kept tokens; continuous vectors among those count as their nearest codes."""
    kept = nearest_code(progress.embeddings_BLC[:, : span.start], teacher.codebook_VC)
    ids = teacher.walk(labels, inverse_cdf(uniforms_BL), recipe, resolved_BN=kept, stop=span.stop)
    progress.embeddings_BLC[:, : span.stop] = F.embedding(ids, teacher.codebook_VC).to(progress.embeddings_BLC.dtype)
