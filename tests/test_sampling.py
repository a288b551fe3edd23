"""Executing plans, against the passes written out by hand."""

import pytest
import torch
from tiny import C, L, make_student, seeded
from torch import Tensor

from ddecode.codebook import nearest_code
from ddecode.plan import parse_plan
from ddecode.sampling import AfterPass, Progress, execute
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher, inverse_cdf

LABELS = torch.tensor([1, 3, 0])
NOISE = torch.randn(3, L, C, generator=seeded(0))
UNIFORMS = torch.rand(3, L, generator=seeded(1))
RECIPE = Recipe(guidance_scale=2.0, top_k=10)
SPLITS = pytest.mark.parametrize("split", [0, 2, 10, L])


def run(plan: str, after_pass: AfterPass | None = None, **models: Teacher | Student) -> Progress:
    inputs = {"noise_BLC": NOISE, "uniforms_BL": UNIFORMS, "labels": LABELS}
    return execute(parse_plan(plan, L), models, **inputs, recipe=RECIPE, after_pass=after_pass)


def one_pass(student: Student, sequence: Tensor, start: int) -> Tensor:
    prediction = student.predict(sequence, LABELS, start=start)
    codes = student.codebook_VC[prediction.logits_BLV.argmax(-1)]
    return torch.cat([codes[:, : student.split], prediction.embeddings_BLC[:, student.split :]], 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@SPLITS
def test_two_steps_keep_the_first_tokens_and_the_original_noise(teacher: Teacher, split: int) -> None:
    student = make_student(teacher, split=split)
    first = one_pass(student, NOISE, 0)
    close(run("student:0-16", student=student).embeddings_BLC, first)
    second = one_pass(student, torch.cat([first[:, :4], NOISE[:, 4:]], 1), 4)
    result = run("student:0-16,student:4-16", student=student)
    close(result.embeddings_BLC, torch.cat([first[:, :4], second[:, 4:]], 1))
    assert result.network_evaluations == 2
    assert (first - second)[:, 4:].abs().max() > 1e-2


def test_the_teacher_alone_walks_with_the_uniforms(teacher: Teacher) -> None:
    result = run("teacher:0-16", teacher=teacher)
    ids = teacher.walk(LABELS, inverse_cdf(UNIFORMS), RECIPE)
    assert torch.equal(result.embeddings_BLC, teacher.codebook_VC[ids])
    assert result.network_evaluations == 16


@SPLITS
def test_a_teacher_span_continues_the_students_tokens(teacher: Teacher, split: int) -> None:
    student = make_student(teacher, split=split, starts=(0, 4, 7))
    first = one_pass(student, NOISE, 0)
    kept = nearest_code(first[:, :4], teacher.codebook_VC)
    ids = teacher.walk(LABELS, inverse_cdf(UNIFORMS), RECIPE, resolved_BN=kept, stop=7)
    assert torch.equal(ids[:, :4], kept)
    codes = teacher.codebook_VC[ids]
    last = one_pass(student, torch.cat([codes, NOISE[:, 7:]], 1), 7)
    result = run("student:0-16,teacher:4-7,student:7-16", student=student, teacher=teacher)
    close(result.embeddings_BLC, torch.cat([codes, last[:, 7:]], 1))
    assert result.network_evaluations == 1 + 3 + 1


def test_a_student_may_emit_no_more_than_the_teacher_then_needs(teacher: Teacher) -> None:
    student = make_student(teacher, starts=(0, 7))
    long = run("student:0-16,teacher:4-7,student:7-16", student=student, teacher=teacher)
    short = run("student:0-4,teacher:4-7,student:7-16", student=student, teacher=teacher)
    close(long.embeddings_BLC, short.embeddings_BLC)


def test_a_span_that_ends_early_drops_the_tokens_after_it(teacher: Teacher) -> None:
    student = make_student(teacher, starts=(0, 4))
    early = run("teacher:0-16,student:4-8,teacher:8-16", student=student, teacher=teacher)
    direct = run("teacher:0-4,student:4-8,teacher:8-16", student=student, teacher=teacher)
    close(early.embeddings_BLC, direct.embeddings_BLC)
    whole = run("teacher:0-16", teacher=teacher)
    assert torch.equal(early.embeddings_BLC[:, :4], whole.embeddings_BLC[:, :4])
    assert not torch.equal(early.embeddings_BLC[:, 8:], whole.embeddings_BLC[:, 8:])


def test_two_models_may_share_the_spans(teacher: Teacher) -> None:
    small = make_student(teacher, seed=5)
    large = make_student(teacher, seed=6)
    first = one_pass(small, NOISE, 0)
    second = one_pass(large, torch.cat([first[:, :4], NOISE[:, 4:]], 1), 4)
    result = run("small:0-4,large:4-16", small=small, large=large)
    close(result.embeddings_BLC, torch.cat([first[:, :4], second[:, 4:]], 1))


def test_unknown_models_and_starts_are_refused(teacher: Teacher, student: Student) -> None:
    with pytest.raises(ValueError, match="no model 'teacher'; there are student"):
        run("teacher:0-16", student=student)
    with pytest.raises(ValueError, match=r"not trained to start at 3; it knows \[0, 4\]"):
        run("teacher:0-3,student:3-16", student=student, teacher=teacher)


def test_a_plan_that_cuts_a_teachers_step_is_refused(scale_teacher: Teacher) -> None:
    options = {"uniforms_BL": UNIFORMS[:, :8], "labels": torch.tensor([0, 1, 2]), "recipe": Recipe()}
    noise = NOISE[:, :8, :4]
    whole = execute(parse_plan("a:0-4,a:4-8", 8), {"a": scale_teacher}, noise_BLC=noise, **options)
    assert whole.network_evaluations == 3
    with pytest.raises(ValueError, match=r"5 is no step boundary of this teacher; those are \[0, 1, 4, 8\]"):
        execute(parse_plan("a:0-5,a:5-8", 8), {"a": scale_teacher}, noise_BLC=noise, **options)


def test_every_pass_is_told_of(teacher: Teacher, student: Student) -> None:
    told: list[tuple[int, int]] = []
    plan = "student:0-4,teacher:4-8,student:4-16"

    def listen(progress: Progress) -> None:
        told.append((progress.network_evaluations, progress.resolved))

    heard = run(plan, listen, teacher=teacher, student=student)
    assert told == [(1, 4), (2, 5), (3, 6), (4, 7), (5, 8), (6, 16)]
    assert torch.equal(heard.embeddings_BLC, run(plan, teacher=teacher, student=student).embeddings_BLC)
    assert heard.network_evaluations == 6


def test_a_teacher_goes_on_from_the_token_it_is_given(teacher: Teacher) -> None:
    def replace(progress: Progress) -> None:
        if progress.resolved == 3:
            progress.embeddings_BLC[:, 2] = teacher.codebook_VC[7] + 0.01

    changed = run("teacher:0-16", replace, teacher=teacher).embeddings_BLC
    plain = run("teacher:0-16", teacher=teacher).embeddings_BLC
    ids = nearest_code(changed, teacher.codebook_VC)
    assert torch.equal(changed[:, :2], plain[:, :2]) and (ids[:, 2] == 7).all()
    rest = teacher.walk(LABELS, inverse_cdf(UNIFORMS), RECIPE, resolved_BN=ids[:, :3])
    assert torch.equal(ids, rest) and not torch.equal(changed, plain)


def test_what_a_later_pass_emits_again_is_left_out_whoever_watches(teacher: Teacher) -> None:
    student = make_student(teacher, starts=(0, 4))
    spans: list[tuple[int, int]] = []
    emit = student.emit

    def spy(sequence: Tensor, labels: Tensor, start: int, stop: int) -> Tensor:
        spans.append((start, stop))
        return emit(sequence, labels, start, stop)

    student.emit = spy  # type: ignore[method-assign]
    plan = parse_plan("student:0-16,student:4-16", L)
    options = {"noise_BLC": NOISE, "uniforms_BL": UNIFORMS, "labels": LABELS, "recipe": RECIPE}
    unwatched = execute(plan, {"student": student}, **options)
    watched = execute(plan, {"student": student}, **options, after_pass=lambda progress: None)
    assert spans == [(0, 4), (4, 16)] * 2
    close(unwatched.embeddings_BLC, watched.embeddings_BLC)
    assert unwatched.network_evaluations == watched.network_evaluations == 2
