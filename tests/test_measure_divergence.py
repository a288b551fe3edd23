"""Divergences of sequences, where they are known in closed form."""

import math

import pytest
import torch
from tiny import L, V, make_teacher, make_wavefront_student, random_noise

from ddecode.pipeline import DistilledPipeline
from ddecode.teacher import Recipe
from ddecode.trajectory import resolve
from tools.measure_divergence import divergences, measure, spans_of

LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(guidance_scale=1.5, top_k=5)])
def test_of_a_student_that_knows_nothing_it_is_what_the_teacher_knows(recipe: Recipe) -> None:
    teacher = make_teacher()
    student = make_wavefront_student(teacher)
    torch.nn.init.zeros_(student.backbone.output.weight)
    noise = random_noise(L)
    ids = resolve(teacher, noise, LABELS, guidance_scale=recipe.guidance_scale, top_k=recipe.top_k)
    with torch.no_grad():
        log_probs = teacher.log_probs(ids, LABELS, recipe)
    known = math.log(V) - torch.special.entr(log_probs.exp()).sum(-1)
    for start, stop in [(0, L), *spans_of(DistilledPipeline(tokenizer=teacher.tokenizer, student=student).plan(2))]:
        found = divergences(student, noise, LABELS, ids, log_probs, (start, stop))
        torch.testing.assert_close(found, known[:, start:stop].sum(1), rtol=1e-4, atol=1e-4)


def test_batches_do_not_matter_and_passes_share_the_tokens() -> None:
    teacher = make_teacher()
    student = make_wavefront_student(teacher)
    pipe = DistilledPipeline(tokenizer=teacher.tokenizer, student=student, teacher=teacher)
    plans = [pipe.plan(1), pipe.plan(2)]
    assert [spans_of(plan) for plan in plans] == [[(0, L)], [(0, student.starts[1]), (student.starts[1], L)]]
    whole, parts = (measure(pipe, plans, num=5, seed=1, batch=batch) for batch in (5, 2))
    assert whole.shape == (5, 3) and (whole > 0).all()
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
