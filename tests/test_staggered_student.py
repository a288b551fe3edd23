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
    random_ids,
    random_noise,
    write_yaml,
)
from torch.nn import functional as F

from ddecode.config import DistillConfig, read_config
from ddecode.teacher import Teacher
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
@pytest.mark.parametrize("exits", [(0, 1, 2), (0, 1, 3), (1, 1, 2)])
def test_a_pass_that_ends_earlier_gives_the_same_tokens(exits: tuple[int, ...], joins: int) -> None:
    student = make_staggered_student(make_var_teacher(depth=exits[-1]), exits=exits, joins=joins)
    noise = random_noise(LENGTH)
    emitted = student.emit(noise, LABELS, 0, LENGTH)
    for stop in range(1, LENGTH):
        part = student.emit(noise, LABELS, 0, stop)
        torch.testing.assert_close(part, emitted[:, :stop], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exits", [(0, 1, 2), (0, 0, 2), (1, 1, 2), (0, 2, 2), (2, 2, 2)])
def test_a_step_sees_the_tokens_before_it_and_nothing_else(teacher: Teacher, exits: tuple[int, ...]) -> None:
    student, ids = make_staggered_student(teacher, exits=exits), random_ids(LENGTH)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": (0, 2)}, "exits must be 3 numbers of blocks, one for each AR step, none less than the one before"),
        ({"exits": (1, 0, 2)}, r"the last all 2, got \[1, 0, 2\]"),
        ({"exits": (-1, 1, 2)}, "the last all 2"),
        ({"exits": (0, 1, 3)}, "the last all 2"),
        ({"joins": 2}, "joins must be 0 or one of the exits before the last block, got 2"),
        ({"exits": (0, 2, 2), "joins": 1}, "joins must be 0 or one of the exits before the last block, got 1"),
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
