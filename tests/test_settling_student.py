"""Students that settle tokens within their depth, of either kind: auto-regressive models of their own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    all_at,
    distill_recipe,
    make_staggered_student,
    make_teacher,
    make_var_teacher,
    make_wavefront_student,
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
from ddecode.settling_student import Mixer, SettlingStudent
from ddecode.staggered_student import StaggeredStudent
from ddecode.teacher import Recipe, Teacher
from ddecode.trajectory import resolve
from ddecode.wavefront_student import WavefrontStudent

LABELS = torch.tensor([0, 1, 2])

Make = Callable[[Teacher], SettlingStudent]


def staggered(exits: tuple[int, ...] = (0, 1, 2), joins: int = 0) -> tuple[Teacher, Make]:
    teacher = make_var_teacher(recipe=Recipe(), depth=exits[-1])
    return teacher, partial(make_staggered_student, exits=exits, joins=joins)


def wavefront(slope: int) -> tuple[Teacher, Make]:
    return make_teacher(recipe=Recipe()), partial(make_wavefront_student, wavefront=slope)


KINDS = {
    "staggered": lambda: staggered(),
    "staggered, two blocks for the last step": lambda: staggered(exits=(0, 1, 3)),
    "staggered, the last step joins": lambda: staggered(exits=(1, 2, 3), joins=1),
    "staggered, two steps after one block": lambda: staggered(exits=(1, 1, 2)),
    "staggered, both": lambda: staggered(exits=(1, 2, 2), joins=1),
    "wavefront of slope 1": lambda: wavefront(1),
    "wavefront of slope 2": lambda: wavefront(2),
    "wavefront of slope 4": lambda: wavefront(4),
}


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> tuple[Teacher, SettlingStudent]:
    teacher, make = KINDS[request.param]()
    return teacher, make(teacher)


def test_all_ways_to_emit_agree(made: tuple[Teacher, SettlingStudent]) -> None:
    _, student = made
    length = student.length
    for start in student.starts:
        sequence = partly(student, random_noise(length), start)
        emitted = student.emit(sequence, LABELS, start, length)
        prediction = student.predict(sequence, LABELS, start)
        torch.testing.assert_close(prediction.embeddings_BLC[:, start:], emitted)
        ids = nearest_code(emitted, student.codebook_VC)
        assert torch.equal(prediction.logits_BLV[:, start:].argmax(-1), ids), "logits that say another token"
        trained = student.emitted(student(sequence, LABELS, all_at(start)), sequence)
        torch.testing.assert_close(trained[:, start:], emitted, atol=1e-5, rtol=1e-5)
        for stop in range(student.starts[-1] + 1, length):
            part = student.emit(sequence, LABELS, start, stop)
            torch.testing.assert_close(part, emitted[:, : stop - start])


def test_the_last_ar_step_is_the_teachers_own_where_all_before_it_is_resolved(
    made: tuple[Teacher, SettlingStudent],
) -> None:
    """It goes through all blocks then, so a student fresh from its teacher, without guidance, gives its tokens."""
    teacher, student = made
    student.initialize_from(teacher)
    for module in student.modules():
        if isinstance(module, Mixer):
            torch.nn.init.zeros_(module.out.weight)
    length, last = student.length, student.length - teacher.backbone.steps[-1]
    noise = random_noise(length)
    ids = resolve(teacher, noise, LABELS, num_steps=student.num_steps)
    sequence = torch.cat([teacher.codebook_VC[ids[:, :last]], noise[:, last:]], 1)
    emitted = student.emit(sequence, LABELS, last, length)
    assert torch.equal(nearest_code(emitted, teacher.codebook_VC), ids[:, last:])


def test_told_its_own_tokens_it_predicts_the_same(made: tuple[Teacher, SettlingStudent]) -> None:
    _, student = made
    for start, stop in student.passes:
        sequence = partly(student, random_noise(student.length), start)
        own = student(sequence, LABELS, all_at(start), stop_B=all_at(stop)).logits_BLV
        ids = student.tokens(sequence, own, student.num_steps)
        told = student(sequence, LABELS, all_at(start), ids, all_at(stop)).logits_BLV
        torch.testing.assert_close(own[:, start:stop], told[:, start:stop])


def test_a_sample_does_not_depend_on_its_batch(made: tuple[Teacher, SettlingStudent]) -> None:
    _, student = made
    length, ids = student.length, random_ids(student.length)
    starts, stops = torch.tensor([student.passes[kind] for kind in (0, 1, -1)]).unbind(1)
    resolved = F.embedding(ids, student.codebook_VC)
    sequence = torch.where((torch.arange(length) < starts[:, None])[..., None], resolved, random_noise(length))
    for told in (None, ids):
        whole = student(sequence, LABELS, starts, told, stops).logits_BLV
        for i in range(3):
            one = slice(i, i + 1)
            told_one = None if told is None else told[one]
            alone = student(sequence[one], LABELS[one], starts[one], told_one, stops[one]).logits_BLV
            predicted = slice(int(starts[i]), int(stops[i]))
            torch.testing.assert_close(alone[:, predicted], whole[one, predicted], atol=1e-5, rtol=1e-4)


def test_training_reaches_every_weight_and_regresses_along_the_pairs_tokens(
    made: tuple[Teacher, SettlingStudent],
) -> None:
    _, student = made
    length, ids = student.length, random_ids(student.length)
    noise, codes = random_noise(length), F.embedding(ids, student.codebook_VC)
    objective = StudentObjective(student, ObjectiveConfig(teacher_forcing=True))
    shown, losses = set(), []
    for seed in range(6):
        losses.append(objective(noise, ids, LABELS, generator=seeded(seed))[0])
        kinds = torch.randint(len(student.passes), (3,), generator=seeded(seed)).tolist()
        passes = [student.passes[kind] for kind in kinds]
        shown |= set(passes)
        starts, stops = torch.tensor(passes).unbind(1)
        position = torch.arange(length)
        counted = (position >= starts[:, None]) & (position < stops[:, None])
        sequence = torch.where(counted[..., None], noise, codes)
        logits = student(sequence, LABELS, starts, ids, stops).logits_BLV
        assert losses[-1].item() == pytest.approx(F.cross_entropy(logits[counted], ids[counted]).item(), rel=1e-5)
    assert shown == set(student.passes)
    torch.stack(losses).sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    own, _ = StudentObjective(student, ObjectiveConfig())(noise, ids, LABELS, generator=seeded(0))
    assert own.item() != pytest.approx(losses[0].item(), rel=1e-3), "was told"


@pytest.mark.parametrize(
    ("make_own_teacher", "kind", "told", "options"),
    [
        (
            make_var_teacher,
            StaggeredStudent,
            {"starts": [0, 5], "exits": [0, 1, 2], "joins": 1},
            {"starts": (0, 5), "exits": (0, 1, 2), "joins": 1, "num_steps": 6},
        ),
        (
            make_teacher,
            WavefrontStudent,
            {"starts": [0, 8], "wavefront": 2},
            {"starts": (0, 8), "wavefront": 2, "num_steps": 6},
        ),
    ],
)
def test_a_distillation_ends_with_one_that_samples_in_one_and_two_steps(
    make_own_teacher: Callable[[], Teacher], kind: type, told: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    teacher = make_own_teacher()
    pipe = DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher)
    recipe = distill_recipe(save_tiny(tmp_path / "teacher", pipe))
    recipe["student"] = told | {"draft_steps": 6}
    recipe["objective"] = {"targets": "probabilities", "teacher_forcing": True}
    config = read_config(write_yaml(tmp_path / "recipe.yaml", recipe), DistillConfig)
    folder = ModelFolder.open(config.teacher)
    manifest = make_manifest(folder.teacher(), config.teacher, folder.teacher_hash(), config.pairs)
    write_pairs(folder.teacher(), manifest, tmp_path / "pairs", show_progress=False)
    model = distill(config, tmp_path / "pairs", tmp_path / "run", show_progress=False)
    loaded = DistilledPipeline.from_pretrained(model)
    assert isinstance(loaded.student, kind)
    assert loaded.student.options() == options
    for steps in (1, 2):
        images = loaded([0, 1], num_inference_steps=steps, generator=seeded(4), output_type="pt").images
        assert images.isfinite().all()
