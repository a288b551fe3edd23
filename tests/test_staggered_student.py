"""Students whose AR steps leave the network one behind the other: an auto-regressive model of their own."""

from pathlib import Path

import pytest
import torch
from tiny import (
    V,
    all_at,
    distill_recipe,
    make_staggered_student,
    make_teacher,
    make_var_teacher,
    partly,
    random_ids,
    random_noise,
    save_tiny,
    seeded,
    write_yaml,
)
from torch.nn import functional as F

from ddecode.checkpoint import ModelFolder
from ddecode.codebook import nearest_code
from ddecode.config import DistillConfig, read_config
from ddecode.distillation import distill
from ddecode.objective_config import ObjectiveConfig
from ddecode.objectives.student import StudentObjective
from ddecode.pairs import make_manifest, write_pairs
from ddecode.pipeline import DistilledPipeline
from ddecode.staggered_student import StaggeredStudent
from ddecode.teacher import Teacher
from ddecode.trajectory import resolve
from third_party_loaders import llamagen

LABELS = torch.tensor([0, 1, 2])
STEPS = (1, 4, 9)
LENGTH = sum(STEPS)


@pytest.fixture
def teacher() -> Teacher:
    return make_var_teacher()


def test_a_steps_tokens_add_up_to_what_the_teacher_reads(teacher: Teacher) -> None:
    backbone, ids = teacher.backbone, random_ids(LENGTH)
    total = backbone.blank_inputs().expand(3, -1, -1)
    for step, (begin, end) in enumerate(((0, 1), (1, 5))):
        added = backbone.added_inputs(ids[:, begin:end], step)
        assert added.shape[1] == LENGTH - end
        total = total + F.pad(added, (0, 0, total.shape[1] - added.shape[1], 0))
        known = backbone.token_inputs(ids[:, :end])
        torch.testing.assert_close(total[:, : known.shape[1]], known)


@pytest.mark.parametrize("joins", [0, 1])
@pytest.mark.parametrize("exits", [(0, 1, 2), (0, 1, 3)])
def test_all_ways_to_emit_agree(exits: tuple[int, ...], joins: int) -> None:
    student = make_staggered_student(make_var_teacher(depth=exits[-1]), exits=exits, joins=joins)
    for start in (0, 5):
        sequence = partly(student, random_noise(LENGTH), start)
        emitted = student.emit(sequence, LABELS, start, LENGTH)
        prediction = student.predict(sequence, LABELS, start)
        torch.testing.assert_close(prediction.embeddings_BLC[:, start:], emitted)
        ids = nearest_code(emitted, student.codebook_VC)
        assert torch.equal(prediction.logits_BLV[:, start:].argmax(-1), ids), "logits that say another token"
        trained = student.emitted(student(sequence, LABELS, all_at(start)), sequence)
        torch.testing.assert_close(trained[:, start:], emitted, atol=1e-5, rtol=1e-5)
        for stop in range(start + 1, LENGTH):  # the pass ends earlier
            part = student.emit(sequence, LABELS, start, stop)
            torch.testing.assert_close(part, emitted[:, : stop - start], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("joins", [0, 1])
def test_the_last_step_is_the_teachers_own_where_all_before_it_is_resolved(joins: int) -> None:
    """It goes through all blocks then, so a student fresh from its teacher, without guidance, gives its tokens."""
    teacher = make_var_teacher(recipe=make_teacher().recipe)
    student = make_staggered_student(teacher, joins=joins)
    student.initialize_from(teacher)
    noise = random_noise(LENGTH)
    ids = resolve(teacher, noise, LABELS, num_steps=student.num_steps)
    sequence = torch.cat([teacher.codebook_VC[ids[:, :5]], noise[:, 5:]], 1)
    emitted = student.emit(sequence, LABELS, 5, LENGTH)
    assert torch.equal(nearest_code(emitted, teacher.codebook_VC), ids[:, 5:])


def test_told_its_own_tokens_it_predicts_the_same(teacher: Teacher) -> None:
    student = make_staggered_student(teacher, joins=1)
    for start in (0, 5):
        sequence = partly(student, random_noise(LENGTH), start)
        own = student(sequence, LABELS, all_at(start)).logits_BLV
        codes = torch.cat([sequence[:, :start], student.emit(sequence, LABELS, start, LENGTH)], 1)
        told = student(sequence, LABELS, all_at(start), told_BL=nearest_code(codes, student.codebook_VC)).logits_BLV
        torch.testing.assert_close(own[:, start:], told[:, start:])


def test_a_step_sees_the_tokens_before_it_and_nothing_else(teacher: Teacher) -> None:
    student, ids = make_staggered_student(teacher), random_ids(LENGTH)
    logits = student(random_noise(LENGTH), LABELS, all_at(0), told_BL=ids).logits_BLV
    again = student(random_noise(LENGTH, 7), LABELS, all_at(0), told_BL=ids).logits_BLV
    torch.testing.assert_close(logits, again, msg="saw noise where it is told")
    for begin, end in ((0, 1), (1, 5), (5, LENGTH)):
        other = ids.clone()
        other[:, begin:end] = (other[:, begin:end] + V // 2) % V
        change = (
            (student(random_noise(LENGTH), LABELS, all_at(0), told_BL=other).logits_BLV - logits).abs().amax((0, 2))
        )
        assert not change[:end].any(), "saw its own step or a later one"
        assert end == LENGTH or change[end:].min() > 1e-4, "blind to an earlier step"


def test_a_sample_does_not_depend_on_its_batch(teacher: Teacher) -> None:
    student = make_staggered_student(teacher, joins=1)
    sequence, starts, ids = partly(student, random_noise(LENGTH), 5), torch.tensor([0, 5, 5]), random_ids(LENGTH)
    for told in (None, ids):
        whole = student(sequence, LABELS, starts, told).logits_BLV
        for i in range(3):
            one = slice(i, i + 1)
            alone = student(sequence[one], LABELS[one], starts[one], None if told is None else told[one]).logits_BLV
            begin = int(starts[i])
            torch.testing.assert_close(alone[:, begin:], whole[one, begin:], atol=1e-5, rtol=1e-4)


def test_training_reaches_every_weight_and_regresses_along_the_pairs_tokens(teacher: Teacher) -> None:
    student, ids = make_staggered_student(teacher, starts=(0,)), random_ids(LENGTH)
    config = ObjectiveConfig(teacher_forcing=True)
    loss, _ = StudentObjective(student, config)(random_noise(LENGTH), ids, LABELS, generator=seeded(3))
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    told = student(random_noise(LENGTH), LABELS, all_at(0), told_BL=ids).logits_BLV
    assert loss.item() == pytest.approx(F.cross_entropy(told.flatten(0, 1), ids.flatten()).item(), rel=1e-5)
    own, _ = StudentObjective(student, ObjectiveConfig())(random_noise(LENGTH), ids, LABELS, generator=seeded(3))
    assert own.item() != pytest.approx(loss.item(), rel=1e-3), "was told"


def test_a_distillation_ends_with_one_that_samples_in_one_and_two_steps(teacher: Teacher, tmp_path: Path) -> None:
    pipe = DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher)
    recipe = distill_recipe(save_tiny(tmp_path / "teacher", pipe))
    recipe["student"] = {"starts": [0, 5], "exits": [0, 1, 2], "joins": 1, "draft_steps": 6}
    recipe["objective"] = {"targets": "probabilities", "teacher_forcing": True}
    config = read_config(write_yaml(tmp_path / "recipe.yaml", recipe), DistillConfig)
    folder = ModelFolder.open(config.teacher)
    manifest = make_manifest(folder.teacher(), config.teacher, folder.teacher_hash(), config.pairs)
    write_pairs(folder.teacher(), manifest, tmp_path / "pairs", show_progress=False)
    model = distill(config, tmp_path / "pairs", tmp_path / "run", show_progress=False)
    loaded = DistilledPipeline.from_pretrained(model)
    assert isinstance(loaded.student, StaggeredStudent)
    assert loaded.student.options() == {"starts": (0, 5), "exits": (0, 1, 2), "joins": 1, "num_steps": 6}
    for steps in (1, 2):
        images = loaded([0, 1], num_inference_steps=steps, generator=seeded(4), output_type="pt").images
        assert images.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": (0, 2)}, "exits must be 3 numbers of blocks, one for each AR step, rising to all 2"),
        ({"exits": (0, 0, 2)}, "rising to all 2"),
        ({"exits": (-1, 1, 2)}, "rising to all 2"),
        ({"exits": (0, 1, 3)}, "rising to all 2"),
        ({"joins": 2}, r"joins must be 0 or one of the exits \[0, 1\], got 2"),
        ({"starts": (0, 4)}, "each start must be the end of an AR step, got 4"),
    ],
)
def test_what_does_not_fit_the_network_is_refused(options: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_staggered_student(make_var_teacher(), **options)  # type: ignore[arg-type]


def test_a_prediction_from_within_a_step_is_refused(teacher: Teacher) -> None:
    student = make_staggered_student(teacher)
    for start in (4, torch.tensor([0, 5, 4])):
        with pytest.raises(ValueError, match="each start must be the end of an AR step, got 4"):
            student.predict(random_noise(LENGTH), LABELS, start)


def test_a_backbone_that_cannot_read_step_by_step_is_refused() -> None:
    teacher = make_teacher()
    config = llamagen.student_config(teacher, None, shifted=True)
    with pytest.raises(ValueError, match="needs a backbone with blank_inputs and added_inputs"):
        llamagen.build_student(config, teacher.tokenizer, None, starts=(0,), exits=(0, 1))


@pytest.mark.parametrize(
    ("student", "objective", "message"),
    [
        ({"split": 3}, {"teacher_forcing": True}, "teacher_forcing is for a student with student.exits or"),
        ({"exits": [0, 1, 2], "joins": 2}, {}, "joins must be 0 or one of student.drafts or student.exits, got 2"),
        ({"exits": [0, 1, 2]}, {"teacher_forcing": True, "energy": 1.0}, "leaves nothing emitted to look at"),
        ({"exits": [0, 1, 2]}, {"teacher_forcing": True, "score": {"weight": 1.0}}, "leaves nothing emitted"),
        ({"exits": [0, 1, 2]}, {"teacher_forcing": True, "fresh_noise": True}, "reads no noise: leave"),
        ({"exits": [0, 1, 2], "drafts": [1]}, {}, "five kinds: give one"),
        ({"starts": [0], "exits": [0, 1, 2]}, {"own_prefix": 0.5, "energy": 1.0}, "student.starts has one"),
    ],
)
def test_recipes_that_ask_for_the_impossible_are_refused(
    student: dict[str, object], objective: dict[str, object], message: str, tmp_path: Path
) -> None:
    tree = distill_recipe(tmp_path) | {"student": student, "objective": objective}
    with pytest.raises(ValueError, match=message):
        read_config(write_yaml(tmp_path / "recipe.yaml", tree), DistillConfig)
