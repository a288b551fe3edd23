"""DD2's student: where it stands, what it may see, and where it begins."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Capture, refused
from tiny import C, V, make_dd2_student, make_teacher, make_var_teacher, save_tiny, scramble, seeded
from torch.nn import functional as F

from ddecode.checkpoint import ModelFolder
from ddecode.codebook import nearest_code
from ddecode.config import DistillConfig, build
from ddecode.dd2_student import DD2Student
from ddecode.objectives.guidance import ARDiffusion
from ddecode.pipeline import DistilledPipeline
from ddecode.teacher import Teacher, forced_hidden

LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(params=[make_teacher, make_var_teacher], ids=["llamagen", "var"])
def any_teacher(request: pytest.FixtureRequest) -> Teacher:
    make: Callable[..., Teacher] = request.param
    return make()


def noise_for(teacher: Teacher, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, teacher.length, C, generator=seeded(seed))


def test_all_ways_to_emit_agree(any_teacher: Teacher) -> None:
    student = make_dd2_student(any_teacher, starts=(0, 5))
    ids = torch.randint(V, (3, 5), generator=seeded(1))
    for start in (0, 5):
        noise = noise_for(any_teacher)
        sequence = torch.cat([F.embedding(ids[:, :start], student.codebook_VC), noise[:, start:]], 1)
        emitted = student.emit(sequence, LABELS, start, student.length)
        prediction = student.predict(sequence, LABELS, start)
        torch.testing.assert_close(prediction.embeddings_BLC[:, start:], emitted)
        assert torch.equal(prediction.logits_BLV[:, start:].argmax(-1), nearest_code(emitted, student.codebook_VC))
        for stop in range(start + 1, student.length):  # without the positions behind it
            part = student.emit(sequence, LABELS, start, stop)
            torch.testing.assert_close(part, emitted[:, : stop - start], atol=1e-5, rtol=1e-5)


def test_a_position_sees_its_own_noise_and_that_of_earlier_steps(any_teacher: Teacher) -> None:
    student, noise = make_dd2_student(any_teacher), noise_for(any_teacher)
    steps = [k for k, n in enumerate(any_teacher.steps) for _ in range(n)]
    before = student.emit(noise, LABELS, 0, student.length)
    for j in range(student.length):
        other = noise.clone()
        other[:, j] += 3
        moved_L = (student.emit(other, LABELS, 0, student.length) - before).abs().amax((0, 2)) > 1e-6
        assert moved_L.tolist() == [steps[j] < steps[i] or j == i for i in range(student.length)]


@pytest.mark.parametrize("level", [1.0, 0.4])
def test_it_begins_as_the_tuned_network_one_jump_from_noise(any_teacher: Teacher, level: float) -> None:
    """q = x - t v from the tuned network's own features where all before is resolved; x has mean and scale of codes at
    the noise level t, at 1 it is the noise."""
    if any_teacher.family == "llamagen":  # token inputs whose mean is far from zero
        any_teacher.backbone.tok_embeddings.weight.data += 1
    tuned = ARDiffusion.from_teacher(any_teacher, depth=1)
    scramble(tuned.head, 3)
    student = make_dd2_student(any_teacher, starts=(0, 5), noise_level=level)
    student.initialize_from_tuned(tuned.backbone, tuned.head)
    ids = torch.randint(V, (3, any_teacher.length), generator=seeded(1))
    noise, codes = noise_for(any_teacher), any_teacher.codebook_VC
    deviation = ((1 - level) ** 2 * codes.var(0, correction=0) + level**2).sqrt()
    x = (1 - level) * codes.mean(0) + deviation * noise
    with torch.no_grad():
        expected = x - level * tuned(ids, LABELS, x, torch.full((3, any_teacher.length), level))
    sequence = torch.cat([F.embedding(ids[:, :5], student.codebook_VC), noise[:, 5:]], 1)
    stop = next(s for s in torch.tensor(any_teacher.steps).cumsum(0).tolist() if s > 5)
    torch.testing.assert_close(student.emit(sequence, LABELS, 5, stop), expected[:, 5:stop], atol=1e-4, rtol=1e-4)


def test_a_fresh_head_emits_the_mean_of_a_gaussian_of_the_codes_scale(any_teacher: Teacher) -> None:
    """E[q | x] = m + (1-t) sigma^2 eps / n where q is normal: m at t = 1, the nearer to m + sigma eps the lower t."""
    codes, noise = any_teacher.codebook_VC, noise_for(any_teacher)
    mean, variance = codes.mean(0), codes.var(0, correction=0)
    for level in (1.0, 0.5, 0.02):
        student = make_dd2_student(any_teacher, noise_level=level)
        student.initialize_from(any_teacher)
        torch.nn.init.zeros_(student.head.output.weight)
        torch.nn.init.zeros_(student.head.output.bias)
        slope = (1 - level) * variance / ((1 - level) ** 2 * variance + level**2).sqrt()
        torch.testing.assert_close(student.emit(noise, LABELS, 0, student.length), mean + slope * noise)


def test_a_code_in_place_of_noise_is_read_as_its_token(any_teacher: Teacher) -> None:
    """Codes at the scale of noise, that is. Exactly so where codes are read linearly: a table that follows from the
    codes; residual convolutions without biases, for codes that have the scale of noise themselves."""
    teacher = any_teacher
    if teacher.family == "var":
        book = teacher.tokenizer.quantize.embedding.weight
        book.data = (book - book.mean(0)) / book.std(0, correction=0)
    if teacher.family == "llamagen":
        table = teacher.backbone.tok_embeddings.weight
        table.data = teacher.codebook_VC @ torch.randn(C, table.shape[1], generator=seeded(5)) + 1
    for name, parameter in teacher.tokenizer.named_parameters():
        if name.startswith("quantize.") and name.endswith("bias"):
            parameter.data.zero_()
    student = make_dd2_student(teacher)
    student.initialize_from(teacher)
    ids = torch.randint(len(teacher.codebook_VC), (3, teacher.length), generator=seeded(1))
    book, none = teacher.codebook_VC, torch.zeros(3, dtype=torch.int64)
    codes = F.embedding(ids, (book - book.mean(0)) / book.std(0, correction=0))
    with torch.no_grad():
        opening = student.opening(codes, LABELS, none, student.length)
        hidden = student.backbone.hidden(opening.inputs_BND, opening.condition)[:, opening.first :]
        expected = forced_hidden(teacher.backbone, ids, teacher.backbone.condition(LABELS))
    torch.testing.assert_close(hidden, expected, atol=1e-3, rtol=1e-3)


def test_it_samples_and_keeps_on_disk(any_teacher: Teacher, tmp_path: Path, capsys: Capture) -> None:
    student = make_dd2_student(any_teacher, starts=(0, 5))
    pipe = DistilledPipeline(tokenizer=any_teacher.tokenizer, teacher=any_teacher, student=student)
    folder = save_tiny(tmp_path / "m", pipe)
    again = DistilledPipeline.from_pretrained(str(folder))
    assert isinstance(again.student, DD2Student) and again.student.options() == student.options()
    for steps in (1, 2):
        ours, theirs = (
            p([0, 1], num_inference_steps=steps, generator=seeded(4), output_type="latent").images
            for p in (pipe, again)
        )
        torch.testing.assert_close(ours, theirs)
    kind = f"dd1-{any_teacher.family}"
    assert "is not DD1's" in refused(capsys, "convert", folder, "--family", kind, "--out", tmp_path / "out")
    assert isinstance(ModelFolder.open(str(folder)).student(), DD2Student)


def test_its_level_is_kept_and_was_1_before_there_were_others(tmp_path: Path) -> None:
    teacher = make_teacher()
    student = make_dd2_student(teacher, noise_level=0.4)
    folder = save_tiny(tmp_path / "m", DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher, student=student))
    assert ModelFolder.open(str(folder)).student().noise_level == 0.4
    config = json.loads((folder / "config.json").read_text())
    assert config["student"].pop("noise_level") == 0.4
    (folder / "config.json").write_text(json.dumps(config))
    assert ModelFolder.open(str(folder)).student().noise_level == 1.0


DD2 = {"diffusion_head": 1, "initial": "tuning"}
TUNED = {"logits": 0.0, "score": {"weight": 1.0, "tuning": {"steps": 1, "batch": 2, "lr": 0.1}}}


@pytest.mark.parametrize(
    ("student", "objective", "told"),
    [
        (DD2 | {"split": 3}, TUNED, "five kinds: give one"),
        (DD2 | {"noise_level": 0.0}, TUNED, r"student\.noise_level must lie in \(0, 1\], got 0\.0"),
        ({"noise_level": 0.5}, {}, "student.noise_level is of a student with student.diffusion_head"),
        (DD2 | {"diffusion_head": 0}, TUNED, "student.diffusion_head must be at least 1"),
        (DD2 | {"depth": 1}, TUNED, "student.initial: tuning is for a student with diffusion_head and all layers"),
        ({"initial": "tuning"}, TUNED, "student.initial: tuning is for a student with diffusion_head"),
        (DD2, TUNED | {"logits": 1.0}, "set objective.logits to 0"),
        ({"diffusion_head": 1}, {"logits": 0.0, "score": {"weight": 1.0, "guidance": "tokens"}}, "emits vectors"),
        (DD2, TUNED | {"score": {"weight": 1.0}}, "student.initial: tuning needs objective.score"),
    ],
)
def test_recipes_that_contradict_themselves(student: object, objective: object, told: str) -> None:
    common = {"teacher": "m", "pairs": {"num": 1}, "training": {"steps": 1, "batch": 1, "lr": 0.1}}
    build(DistillConfig, common | {"student": DD2, "objective": TUNED}, "")
    with pytest.raises(ValueError, match=told):
        build(DistillConfig, common | {"student": student, "objective": objective}, "")
