"""Students through whose depth a raster of tokens goes diagonal by diagonal: an auto-regressive model of their own."""

from pathlib import Path

import pytest
import torch
from tiny import (
    L,
    V,
    all_at,
    distill_recipe,
    make_teacher,
    make_var_teacher,
    make_wavefront_student,
    random_ids,
    random_noise,
    write_yaml,
)

from ddecode import wavefront_student
from ddecode.codebook import nearest_code
from ddecode.config import DistillConfig, read_config
from ddecode.teacher import Teacher
from third_party_loaders import var

LABELS = torch.tensor([0, 1, 2])
SIDE = 4


@pytest.fixture
def teacher() -> Teacher:
    return make_teacher()


def place(token: int, slope: int) -> int:
    return token % SIDE + slope * (token // SIDE)


@pytest.mark.parametrize("slope", [1, 2, SIDE])
@pytest.mark.parametrize(("start", "end"), [(0, L), (0, 6), (6, L), (L - 1, L)])
def test_diagonals_hold_each_token_once_and_go_evenly_through_the_depth(
    teacher: Teacher, slope: int, start: int, end: int
) -> None:
    diagonals = make_wavefront_student(teacher, wavefront=slope).diagonals(start, end)
    assert sorted(token for tokens, _ in diagonals for token in tokens) == list(range(start, end))
    places = [{place(token, slope) for token in tokens} for tokens, _ in diagonals]
    assert all(len(one) == 1 for one in places)
    assert [min(one) for one in places] == sorted(min(one) for one in places)
    exits = [exit for _, exit in diagonals]
    assert exits == sorted(exits) and exits[-1] == 2
    assert [tokens for tokens, exit in diagonals if exit == 0] == ([[0]] if start == 0 else [])
    counts = [exits.count(block) for block in (1, 2)]
    assert max(counts) - min(counts) <= 1


def test_a_first_pass_is_the_one_that_training_showed(teacher: Teacher) -> None:
    """The tokens before the second start have all of the depth to themselves, whoever asks for some of them."""
    student, noise = make_wavefront_student(teacher), random_noise(L)
    assert student.passes == [(0, 8), (0, L), (8, L)]
    emitted = student.emit(noise, LABELS, 0, 8)
    logits = student(noise, LABELS, all_at(0), stop_B=all_at(8)).logits_BLV[:, :8]
    own = student.tokens(noise[:, :8], logits, student.num_steps)
    assert torch.equal(nearest_code(emitted, student.codebook_VC), own)
    torch.testing.assert_close(student.emit(noise, LABELS, 0, 3), emitted[:, :3])
    assert not torch.equal(student.emit(noise, LABELS, 0, L)[:, :8], emitted), "one schedule for both"


@pytest.mark.parametrize("slope", [1, 2, SIDE])
def test_neighbours_see_a_token_at_once_others_after_a_block_and_its_noise_all(teacher: Teacher, slope: int) -> None:
    student, ids, noise = make_wavefront_student(teacher, wavefront=slope), random_ids(L), random_noise(L)
    logits = student(noise, LABELS, all_at(0), ids).logits_BLV

    def seen_by(change_BLV: torch.Tensor) -> set[int]:
        return {p for p, change in enumerate((change_BLV - logits).abs().amax((0, 2)).tolist()) if change > 1e-6}

    exits = {token: exit for tokens, exit in student.diagonals(0, L) for token in tokens}
    for token in range(L):
        other = ids.clone()
        other[:, token] = (other[:, token] + V // 2) % V
        near = {token + 1, *(token + SIDE + c for c in (-1, 0) if token % SIDE + c >= 0)}
        later = {p for p in range(token + 1, L) if place(token, slope) < place(p, slope)}
        seen = seen_by(student(noise, LABELS, all_at(0), other).logits_BLV)
        assert seen == {p for p in later if exits[p] > exits[token] or p in near}
    changed = noise.clone()
    changed[:, 5] += 1
    seen = seen_by(student(changed, LABELS, all_at(0), ids).logits_BLV)
    assert seen and min(seen) > 5


@pytest.mark.parametrize("slope", [0, SIDE + 1])
def test_a_slope_that_does_not_fit_the_square_is_refused(teacher: Teacher, slope: int) -> None:
    with pytest.raises(ValueError, match=f"the wavefront's slope must lie in 1..4, got {slope}"):
        make_wavefront_student(teacher, wavefront=slope)


def test_a_teacher_that_is_no_raster_is_refused() -> None:
    teacher = make_var_teacher()
    config = var.student_config(teacher, None, shifted=True)
    with pytest.raises(ValueError, match="a square in raster order, one an AR step; this one's AR steps have 1, 4, 9"):
        var.build_student(config, teacher.tokenizer, None, starts=(0,), wavefront=2)


def test_a_slope_beside_another_kind_is_refused(tmp_path: Path) -> None:
    tree = distill_recipe(tmp_path) | {"student": {"wavefront": 2, "drafts": [1]}}
    with pytest.raises(ValueError, match="five kinds: give one"):
        read_config(write_yaml(tmp_path / "recipe.yaml", tree), DistillConfig)


@torch.no_grad()
def test_a_table_of_what_codes_add_follows_the_weights_and_is_left_out_of_training(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_wavefront_student(teacher).eval()
    noise, ids = random_noise(L), torch.arange(V)[None]

    def emitted_without() -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(wavefront_student, "LARGEST_TABLE", 0)
            assert student.table() is None
            return student.emit(noise, LABELS, 0, L)

    before = student.table()
    assert before is not None and student.table() is before
    torch.testing.assert_close(before, student.token_map(student.backbone.token_inputs(ids))[0])
    torch.testing.assert_close(student.emit(noise, LABELS, 0, L), emitted_without())
    for weight in (student.token_map.weight, student.backbone.tok_embeddings.weight):
        weight.mul_(-2)
        after = student.table()
        assert after is not None and not torch.equal(after, before)
        torch.testing.assert_close(student.emit(noise, LABELS, 0, L), emitted_without())
    assert student.train().table() is None


def test_no_table_where_a_tokens_input_depends_on_its_position(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_wavefront_student(teacher).eval()
    plain = student.backbone.token_inputs
    monkeypatch.setattr(
        student.backbone, "token_inputs", lambda ids_BN: plain(ids_BN) + torch.arange(ids_BN.shape[1])[:, None]
    )
    assert student.table() is None
    assert student.emit(random_noise(L), LABELS, 0, L).isfinite().all()
