"""Students that draft: where they stand, what they may see, and that the map makes their tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Capture, refused
from tiny import C, V, make_draft_student, make_teacher, make_var_teacher, save_tiny, seeded
from torch.nn import functional as F

from ddecode.checkpoint import ModelFolder
from ddecode.codebook import nearest_code
from ddecode.draft_student import DraftStudent
from ddecode.flow import noise_to_tokens
from ddecode.objective_config import ObjectiveConfig
from ddecode.objectives.student import StudentObjective
from ddecode.pipeline import DistilledPipeline
from ddecode.teacher import Teacher
from ddecode.trajectory import resolve

LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(params=[make_teacher, make_var_teacher], ids=["llamagen", "var"])
def any_teacher(request: pytest.FixtureRequest) -> Teacher:
    make: Callable[..., Teacher] = request.param
    return make(recipe=make_teacher().recipe)


def student_of(teacher: Teacher, **options: Any) -> DraftStudent:
    return make_draft_student(teacher, starts=(0, 5), **options)


def noise_for(teacher: Teacher, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, teacher.length, C, generator=seeded(seed))


def partly(student: DraftStudent, noise_BLC: torch.Tensor, start: int, seed: int = 1) -> torch.Tensor:
    """A sequence with random tokens before `start`."""
    ids_BN = torch.randint(V, (len(noise_BLC), start), generator=seeded(seed))
    return torch.cat([F.embedding(ids_BN, student.codebook_VC), noise_BLC[:, start:]], 1)


@pytest.mark.parametrize("joins", [0, 1])
def test_all_ways_to_emit_agree(joins: int, any_teacher: Teacher) -> None:
    student = student_of(any_teacher, joins=joins)
    for start in (0, 5):
        sequence = partly(student, noise_for(any_teacher), start)
        emitted = student.emit(sequence, LABELS, start, student.length)
        prediction = student.predict(sequence, LABELS, start)
        torch.testing.assert_close(prediction.embeddings_BLC[:, start:], emitted)
        ids = nearest_code(emitted, student.codebook_VC)
        assert torch.equal(prediction.logits_BLV[:, start:].argmax(-1), ids), "logits that say another token"
        trained = student.emitted(student(sequence, LABELS, torch.full((3,), start)), sequence)
        torch.testing.assert_close(trained[:, start:], emitted, atol=1e-5, rtol=1e-5)
        for stop in range(start + 1, student.length):  # without the positions behind it
            part = student.emit(sequence, LABELS, start, stop)
            torch.testing.assert_close(part, emitted[:, : stop - start], atol=1e-5, rtol=1e-5)


def test_the_step_after_resolved_tokens_is_the_teachers_own(any_teacher: Teacher) -> None:
    """Fresh from its teacher and without guidance it knows the first open step exactly, so the map gives its token."""
    student = student_of(any_teacher, drafts=())
    student.initialize_from(any_teacher)
    student.noise_map.weight.data.zero_()
    student.noise_map.bias.data.zero_()
    noise = noise_for(any_teacher)
    ids = resolve(any_teacher, noise, LABELS, num_steps=student.num_steps)
    for step, start in ((0, 0), (1, any_teacher.steps[0])):
        stop = start + any_teacher.steps[step]
        sequence = torch.cat([any_teacher.codebook_VC[ids[:, :start]], noise[:, start:]], 1)
        emitted = student.emit(sequence, LABELS, start, stop)
        assert torch.equal(nearest_code(emitted, any_teacher.codebook_VC), ids[:, start:stop])


def test_probabilities_depend_on_earlier_noise_and_on_nothing_else(any_teacher: Teacher) -> None:
    student = student_of(any_teacher)
    first, last = any_teacher.steps[0], student.length - any_teacher.steps[-1]
    noise, start = noise_for(any_teacher), torch.zeros(3, dtype=torch.int64)
    logits = student(noise, LABELS, start).logits_BLV
    changed = noise.clone()
    changed[:, last:] = noise_for(any_teacher, 7)[:, last:]
    torch.testing.assert_close(student(changed, LABELS, start).logits_BLV, logits, msg="saw the noise of the last step")
    changed = noise.clone()
    changed[:, :first] = noise_for(any_teacher, 7)[:, :first]
    after = student(changed, LABELS, start).logits_BLV
    torch.testing.assert_close(after[:, :first], logits[:, :first], msg="saw its own noise")
    assert (after[:, first:] - logits[:, first:]).abs().amax((0, 2)).min() > 1e-4, "blind to earlier noise"


def test_resolved_tokens_hide_their_noise_and_are_not_drafted_anew(any_teacher: Teacher) -> None:
    student = student_of(any_teacher)
    noise = noise_for(any_teacher)
    logits = [student(partly(student, n, 5), LABELS, torch.full((3,), 5)).logits_BLV for n in (noise, noise.clone())]
    other = noise.clone()
    other[:, :5] = 0
    again = student(partly(student, other, 5), LABELS, torch.full((3,), 5)).logits_BLV
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], again)


def test_the_last_step_joining_late_changes_nothing_before_it(any_teacher: Teacher) -> None:
    """Nothing reads its positions, so all other logits are those of a student in which it is there from the start."""
    student, late = student_of(any_teacher), student_of(any_teacher, joins=1)
    last = student.length - any_teacher.steps[-1]
    arguments = partly(student, noise_for(any_teacher), 5), LABELS, torch.full((3,), 5)
    ours, theirs = (s(*arguments) for s in (student, late))
    torch.testing.assert_close(ours.drafts, theirs.drafts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.logits_BLV[:, :last], theirs.logits_BLV[:, :last], atol=1e-5, rtol=1e-4)
    assert (ours.logits_BLV[:, last:] - theirs.logits_BLV[:, last:]).abs().max() > 1e-4


def test_a_sample_does_not_depend_on_its_batch(any_teacher: Teacher) -> None:
    student = student_of(any_teacher)
    sequence = partly(student, noise_for(any_teacher), 5)
    starts = torch.tensor([0, 5, 5])
    whole = student(sequence, LABELS, starts).logits_BLV
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(
            student(sequence[one], LABELS[one], starts[one]).logits_BLV, whole[one], atol=1e-5, rtol=1e-4
        )


def test_drafts_are_the_maps_tokens_fed_back(any_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters after the first block is what the teacher reads of the tokens that the draft's logits map to."""
    student = student_of(any_teacher)
    read = student.length - any_teacher.steps[-1]
    fed = []
    token_inputs = student.backbone.token_inputs
    monkeypatch.setattr(student.backbone, "token_inputs", lambda ids, **k: (fed.append(ids), token_inputs(ids, **k))[1])
    noise = noise_for(any_teacher)
    drafts = student(noise, LABELS, torch.zeros(3, dtype=torch.int64)).drafts
    assert [d.shape for d in drafts] == [(3, read, V)]
    expected = noise_to_tokens(noise[:, :read], drafts[0], student.codebook_VC, student.draft_steps)
    assert len(fed) == 1 and torch.equal(fed[0], expected)


def test_training_reaches_every_weight(any_teacher: Teacher) -> None:
    student = student_of(any_teacher)
    noise = noise_for(any_teacher)
    ids = torch.randint(V, noise.shape[:2], generator=seeded(2))
    loss, metrics = StudentObjective(student, ObjectiveConfig())(noise, ids, LABELS, generator=seeded(3))
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    without, _ = StudentObjective(student, ObjectiveConfig(drafts=0.0))(noise, ids, LABELS, generator=seeded(3))
    assert without.item() == pytest.approx(metrics["cross_entropy"].item(), rel=1e-5)
    assert loss.item() > without.item()


def test_the_gradient_of_what_is_emitted_favours_codes_near_the_noise(any_teacher: Teacher) -> None:
    """Pulled towards the code that the map would take next, that code's logit rises."""
    student = student_of(any_teacher)
    noise = noise_for(any_teacher)
    prediction = student(noise, LABELS, torch.zeros(3, dtype=torch.int64))
    prediction.logits_BLV.retain_grad()
    emitted = student.emitted(prediction, noise)
    ids = nearest_code(emitted, student.codebook_VC)
    rest = prediction.logits_BLV.detach().scatter(-1, ids[..., None], -torch.inf)
    second = noise_to_tokens(noise, rest, student.codebook_VC, student.num_steps)
    target = student.codebook_VC[second]
    (emitted - target).square().sum().backward()
    grad = prediction.logits_BLV.grad.gather(-1, second[..., None])
    assert (grad < 0).float().mean() > 0.95


def test_a_folder_keeps_it_and_it_samples_in_one_and_two_steps(any_teacher: Teacher, tmp_path: Path) -> None:
    pipe = DistilledPipeline(tokenizer=any_teacher.tokenizer, teacher=any_teacher, student=student_of(any_teacher))
    save_tiny(tmp_path / "m", pipe)
    loaded = DistilledPipeline.from_pretrained(tmp_path / "m")
    assert isinstance(loaded.student, DraftStudent)
    assert loaded.student.options() == pipe.student.options()
    for steps in (1, 2):
        ours, theirs = (
            p([0, 1], num_inference_steps=steps, generator=seeded(4), output_type="pt") for p in (pipe, loaded)
        )
        torch.testing.assert_close(ours.images, theirs.images)


def test_upstreams_layout_cannot_hold_it(any_teacher: Teacher, tmp_path: Path, capsys: Capture) -> None:
    pipe = DistilledPipeline(tokenizer=any_teacher.tokenizer, teacher=any_teacher, student=student_of(any_teacher))
    save_tiny(tmp_path / "m", pipe)
    kind = f"dd1-{any_teacher.family}"
    assert "is not DD1's" in refused(capsys, "convert", tmp_path / "m", "--family", kind, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("drafts", [(0,), (2,), (1, 1)])
def test_drafts_outside_the_network_are_refused(drafts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"drafts must rise within 1..1"):
        make_draft_student(make_teacher(), drafts=drafts)


def test_a_config_of_neither_kind_is_refused(any_teacher: Teacher, tmp_path: Path) -> None:
    pipe = DistilledPipeline(tokenizer=any_teacher.tokenizer, teacher=any_teacher, student=student_of(any_teacher))
    folder = ModelFolder.open(save_tiny(tmp_path / "m", pipe))
    folder.config["student"].pop("draft_steps")
    with pytest.raises(ValueError, match="must hold backbone, starts, drafts, joins, num_steps, draft_steps"):
        folder.student()


def test_the_last_step_joins_at_a_draft_or_not_at_all() -> None:
    with pytest.raises(ValueError, match=r"joins must be 0 or one of the drafts \[1\], got 2"):
        make_draft_student(make_teacher(), joins=2)
