"""Executing a plan: noise and labels in, token embeddings out.

B batch, L token positions, C code width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.plan import Plan, Span, check_plan
from ddecode.student import Student
from ddecode.teacher import Pick, Recipe, Teacher, inverse_cdf
from ddecode.trajectory import MappedTeacher


@dataclass(frozen=True, kw_only=True)
class Skip:
    """The control that leaves the rest out: it emits zero vectors, at no cost."""

    length: int


Model = Teacher | Student | Skip


@dataclass(kw_only=True)
class Progress:
    """A sequence on its way: the first `resolved` positions of `embeddings_BLC` are emitted, the rest is zero."""

    embeddings_BLC: Tensor
    resolved: int = 0
    network_evaluations: int = field(default=0)


AfterPass = Callable[[Progress], None]
"""Told of every pass of a network; it may change the embeddings, see `execute`."""


@torch.no_grad()
def execute(
    plan: Plan,
    models: Mapping[str, Model],
    *,
    noise_BLC: Tensor,
    uniforms_BL: Tensor,
    labels: Any,
    recipe: Recipe,
    after_pass: AfterPass | None = None,
) -> Progress:
    """Run every span of a plan.

    Args:
        plan: see `ddecode.plan`.
        models: the models it names.
        noise_BLC: standard normal fp32; a student's pass reads it at all positions it has not resolved, and a
            `MappedTeacher` makes its tokens of it.
        uniforms_BL: fp32 in [0, 1); any other teacher's span draws its tokens with them.
        labels: checked class labels [B].
        recipe: guidance and filtering of teacher spans.
        after_pass: called after every pass of a student and every AR step of a teacher. What it makes of the
            embeddings is what later passes read; a teacher's span is past all but the tokens of its last step.

    Raises:
        ValueError: see `check_models`.
    """
    check_models(plan, models)
    progress = Progress(embeddings_BLC=torch.zeros_like(noise_BLC))
    for span in without_repeats(plan, models):
        model, before = models[span.who], progress.network_evaluations
        if isinstance(model, Skip):
            progress.embeddings_BLC[:, span.start : span.stop] = 0
        elif isinstance(model, Student):
            emit_with_student(model, span, progress, noise_BLC, labels)
        else:
            pick = model.pick(noise_BLC) if isinstance(model, MappedTeacher) else inverse_cdf(uniforms_BL)
            emit_with_teacher(model, span, progress, pick, labels, recipe, after_pass)
        progress.resolved = span.stop
        progress.network_evaluations = before + passes(model, span)
        if isinstance(model, Student) and after_pass is not None:
            after_pass(progress)
    return progress


def without_repeats(plan: Plan, models: Mapping[str, Model]) -> list[Span]:
    """The spans, a student's without what later spans emit again, which would be for nothing."""
    spans = []
    for i, span in enumerate(plan.spans):
        stop = min([span.stop, *(later.start for later in plan.spans[i + 1 :])])
        cut = isinstance(models[span.who], Student) and span.start < stop
        spans.append(replace(span, stop=stop) if cut else span)
    return spans


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
    teacher: Teacher,
    span: Span,
    progress: Progress,
    pick: Pick,
    labels: Any,
    recipe: Recipe,
    after_pass: AfterPass | None = None,
) -> None:
    """AR steps after the kept tokens; continuous vectors among those count as their nearest codes."""
    kept = nearest_code(progress.embeddings_BLC[:, : span.start], teacher.codebook_VC)
    if after_pass is not None:
        pick = told(pick, teacher.codebook_VC, progress, after_pass)
    ids = teacher.walk(labels, pick, recipe, resolved_BN=kept, stop=span.stop)
    progress.embeddings_BLC[:, : span.stop] = F.embedding(ids, teacher.codebook_VC).to(progress.embeddings_BLC.dtype)


def told(pick: Pick, codebook_VC: Tensor, progress: Progress, after_pass: AfterPass) -> Pick:
    """A `pick` that tells of every AR step; embeddings that change there count as their nearest codes."""

    def pick_and_tell(log_probs_BNV: Tensor, start: int) -> Tensor:
        ids_BN = pick(log_probs_BNV, start)
        stop = start + ids_BN.shape[1]
        codes_BNC = F.embedding(ids_BN, codebook_VC).to(progress.embeddings_BLC.dtype)
        progress.embeddings_BLC[:, start:stop] = codes_BNC
        progress.resolved = stop
        progress.network_evaluations += 1
        after_pass(progress)
        now_BNC = progress.embeddings_BLC[:, start:stop]
        changed_BN = (now_BNC != codes_BNC).any(-1)
        return torch.where(changed_BN, nearest_code(now_BNC, codebook_VC), ids_BN)

    return pick_and_tell
