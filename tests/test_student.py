"""The student: what it inherits, what it is told, what it may see and what it emits."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import C, L, V, make_student, make_teacher, make_var_student, make_var_teacher, seeded
from torch import Tensor
from torch.nn import functional as F

from ddecode.student import ContinuousHead, Student, kept_layers
from ddecode.teacher import Teacher
from ddecode.types import Condition
from third_party_loaders.llamagen_transformer import fit_input_map


def noise_for(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, L, C, generator=seeded(seed))


def test_it_takes_the_teachers_weights_by_name() -> None:
    teacher = make_teacher(seed=1)
    student = make_student(teacher, seed=9)
    student.initialize_from(teacher)
    ours, theirs = student.backbone.state_dict(), teacher.backbone.state_dict()
    shared = [name for name in ours if not name.startswith("tok_embeddings.")]
    assert set(ours) - set(shared) == {"tok_embeddings.weight", "tok_embeddings.bias"}
    assert set(shared) == set(theirs) - {"tok_embeddings.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert ours["output.weight"].data_ptr() != theirs["output.weight"].data_ptr()
    assert not student.indicator.weight.any()


def test_fewer_layers_are_evenly_spaced() -> None:
    teacher = make_teacher(depth=5)
    student = make_student(teacher, depth=3)
    student.initialize_from(teacher)
    assert len(student.backbone.layers) == 3
    for ours, theirs in zip(student.backbone.layers, (0, 2, 4), strict=True):
        for name, tensor in teacher.backbone.layers[theirs].state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor)


def test_kept_layers() -> None:
    assert kept_layers(6, 6) == list(range(6))
    assert kept_layers(12, 4) == [0, 4, 7, 11]
    assert kept_layers(7, 1) == [0]
    for depth in range(1, 20):
        for kept in range(2, depth + 1):
            layers = kept_layers(depth, kept)
            assert len(set(layers)) == kept and layers == sorted(layers) and (layers[0], layers[-1]) == (0, depth - 1)
    for kept in (0, 7, -1):
        with pytest.raises(ValueError, match=f"a student of {kept} layers cannot be cut from a teacher of 6"):
            kept_layers(6, kept)


def test_a_deeper_student_than_its_teacher_is_refused(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="3 layers cannot be cut from a teacher of 2"):
        make_student(teacher, depth=3).initialize_from(teacher)


def test_another_width_is_refused_by_name(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wqkv\.weight"):
        make_student(make_teacher(width=48)).initialize_from(teacher)


def test_the_input_map_is_the_least_squares_fit(teacher: Teacher) -> None:
    codes, table = teacher.codebook_VC, teacher.backbone.tok_embeddings.weight.detach()
    fitted = fit_input_map(codes, table)
    design = np.concatenate([codes.numpy(), np.ones((V, 1), np.float32)], 1)
    expected = np.linalg.lstsq(design, table.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fitted["tok_embeddings.weight"].numpy(), expected[:-1].T, atol=1e-4)
    np.testing.assert_allclose(fitted["tok_embeddings.bias"].numpy(), expected[-1], atol=1e-4)


def test_the_input_map_does_not_depend_on_where_its_inputs_lie_in_memory(teacher: Teacher) -> None:
    codes, table = teacher.codebook_VC, teacher.backbone.tok_embeddings.weight.detach()
    expected = fit_input_map(codes, table)["tok_embeddings.weight"]
    for offset in (1, 2, 4, 7):
        moved = torch.empty(table.numel() + offset)[offset:].view_as(table).copy_(table)
        assert torch.equal(fit_input_map(codes, moved)["tok_embeddings.weight"], expected), offset


def test_the_indicator_marks_condition_and_resolved_positions(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[Tensor] = []
    hidden = student.backbone.hidden

    def recorded(inputs_BND: Tensor, condition: Condition, **options: object) -> Tensor:
        inputs.append(inputs_BND)
        return hidden(inputs_BND, condition, **options)

    monkeypatch.setattr(student.backbone, "hidden", recorded)
    sequence = noise_for(3)
    student.predict(sequence, [0, 1, 2], start=torch.tensor([0, 4, 15]))
    labels = student.backbone.condition(torch.tensor([0, 1, 2])).prefix_BPD
    vectors = torch.cat([labels, student.backbone.vector_inputs(sequence)], 1)
    added = inputs[0] - vectors
    for row, start in zip(added, (0, 4, 15), strict=True):
        rows = torch.tensor([1] * (1 + start) + [0] * (L - start))
        torch.testing.assert_close(row, student.indicator.weight[rows], atol=1e-5, rtol=1e-5)


def test_start_may_differ_within_a_batch(student: Student) -> None:
    sequence, starts = noise_for(3), [0, 4, 7]
    together = student.predict(sequence, [0, 1, 2], start=torch.tensor(starts))
    for i, start in enumerate(starts):
        alone = student.predict(sequence[i : i + 1], i, start=start)
        torch.testing.assert_close(together.logits_BLV[i], alone.logits_BLV[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.embeddings_BLC[i], alone.embeddings_BLC[0], atol=1e-4, rtol=1e-4)
    assert together.logits_BLV.shape == (3, L, V) and together.embeddings_BLC.shape == (3, L, C)
    assert together.logits_BLV.dtype == together.embeddings_BLC.dtype == torch.float32
    other = student.predict(sequence[1:2], 1, start=0)
    assert not torch.allclose(other.logits_BLV[0], together.logits_BLV[1], atol=1e-3)


@pytest.mark.parametrize("j", [0, 5, L - 1])
def test_a_position_sees_its_own_noise_and_none_after_it(student: Student, j: int) -> None:
    sequence = noise_for(2)
    changed = sequence.clone()
    changed[:, j] += 1.0
    before, after = student.predict(sequence, [0, 1]), student.predict(changed, [0, 1])
    for a, b in ((before.logits_BLV, after.logits_BLV), (before.embeddings_BLC, after.embeddings_BLC)):
        difference = (a - b).abs().amax((0, 2))
        assert (difference[:j] < 1e-6).all()
        assert difference[j] > 1e-3


@pytest.mark.parametrize("split", [0, 3, 10, L])
@pytest.mark.parametrize(("start", "stop"), [(0, L), (4, L), (4, 9), (0, 3)])
def test_it_emits_tokens_before_split_and_vectors_after(teacher: Teacher, split: int, start: int, stop: int) -> None:
    student = make_student(teacher, split=split)
    labels = torch.tensor([3, 0])
    prediction = student.predict(noise_for(2), labels, start=start)
    codes = student.codebook_VC[prediction.logits_BLV.argmax(-1)]
    expected = torch.cat([codes[:, :split], prediction.embeddings_BLC[:, split:]], 1)[:, start:stop]
    torch.testing.assert_close(student.emit(noise_for(2), labels, start, stop), expected, atol=1e-5, rtol=1e-4)


def test_the_continuous_head_is_its_formula() -> None:
    head = ContinuousHead(12, 5)
    hidden, label = torch.randn(2, 3, 12, generator=seeded(0)), torch.randn(2, 12, generator=seeded(1))
    shift, scale = head.scale_shift_table[0] + label, head.scale_shift_table[1] + label
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = F.linear(normed * (1 + scale[:, None]) + shift[:, None], head.linear.weight, head.linear.bias)
    torch.testing.assert_close(head(hidden, label), expected, atol=1e-5, rtol=1e-4)


def test_the_tokenizer_is_not_part_of_its_weights(student: Student, teacher: Teacher) -> None:
    tops = {name.split(".")[0] for name in student.state_dict()}
    assert tops == {"backbone", "indicator", "continuous_head"}
    assert student.tokenizer is teacher.tokenizer
    assert not any(p is q for p in student.parameters() for q in teacher.tokenizer.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_BLC": torch.zeros(2, L - 1, C)}, r"must be \[B, 16, 8\]"),
        ({"sequence_BLC": torch.zeros(L, C)}, r"must be \[B, 16, 8\]"),
        ({"class_labels": [0, 5]}, "class 5 is out of range"),
        ({"class_labels": [0, 1, 2]}, "3 class labels for a batch of 2"),
        ({"start": -1}, "start must lie in 0..15"),
        ({"start": L}, "start must lie in 0..15"),
        ({"start": torch.tensor([0, 16])}, "start must lie in 0..15"),
        ({"start": torch.tensor([0, 1, 2])}, "start"),
    ],
)
def test_wrong_arguments_are_refused(student: Student, arguments: dict, message: str) -> None:
    defaults = {"sequence_BLC": torch.zeros(2, L, C), "class_labels": [0, 1]}
    with pytest.raises(ValueError, match=message):
        student.predict(**defaults | arguments)


def test_wrong_starts_and_splits_are_refused(teacher: Teacher) -> None:
    for options in ({"split": L + 1}, {"split": -1}, {"starts": (0, L)}, {"starts": (-1,)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_student(teacher, **options)


def test_positions_behind_what_is_kept_are_left_out_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_var_student(make_var_teacher(), starts=(0, 5))
    noise = torch.randn(2, student.length, C, generator=seeded(3))
    labels = torch.tensor([3, 0])
    whole = student.emit(noise, labels, 0, student.length)
    for stop in (1, 4, 5, 9):
        part = student.emit(noise, labels, 0, stop)
        torch.testing.assert_close(part, whole[:, :stop], atol=1e-5, rtol=1e-4)
    seen: list[int] = []
    hidden = student.backbone.hidden

    def spy(inputs_BND: Tensor, condition: Condition, **options: Any) -> Tensor:
        seen.append(inputs_BND.shape[1])
        return hidden(inputs_BND, condition, **options)

    monkeypatch.setattr(student.backbone, "hidden", spy)
    student.emit(noise, labels, 0, 4)
    assert seen == [1 + 5], "more than the class and the AR steps up to the fourth token"
