"""Previews: what their rows show, and losses on sequences that no pairs hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import L, make_draft_student, make_student, make_teacher, make_var_teacher, make_wavefront_student, seeded
from torch.nn import functional as F

from ddecode import previews
from ddecode.config import PairsConfig, as_dict
from ddecode.images import to_uint8
from ddecode.objectives.guidance import ARDiffusion
from ddecode.pairs import make_manifest, noise_of
from ddecode.pipeline import DistilledPipeline
from ddecode.previews import Preview, emitted
from ddecode.randomness import derived_seed, sample_seed
from ddecode.student import Student
from ddecode.teacher import Teacher
from ddecode.trajectory import resolve


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten sequences, three at once."""
    for name, number in (("KEPT", 10), ("AT_ONCE", 3)):
        monkeypatch.setattr(previews, name, number)


def make_preview(student: Student, teacher: Teacher, folder: Path, **options: Any) -> Preview:
    recipe = as_dict(teacher.recipe)
    return Preview(student, teacher, folder, recipe=recipe, num_steps=8, seed=3, **options)


def bands_of(path: Path, side: int, rows: int) -> np.ndarray:
    """The images of a picture, uint8 [bands,rows,columns,H,W,3], brought back to their size."""
    pixels = np.asarray(Image.open(path))
    scale = 96 // side
    small = pixels[::scale, ::scale]
    assert np.array_equal(small.repeat(scale, 0).repeat(scale, 1), pixels)
    down, across = small.shape[0] // side, small.shape[1] // side
    return small.reshape(down // rows, rows, side, across, side, 3).swapaxes(2, 3)


@pytest.mark.parametrize("kind", ["dd1", "draft"])
def test_the_rows_are_teacher_student_in_one_and_two_passes_and_guidance(kind: str, tmp_path: Path) -> None:
    teacher = make_teacher() if kind == "dd1" else make_var_teacher()
    make: Any = make_student if kind == "dd1" else make_draft_student
    starts = (0, 4) if kind == "dd1" else (0, 5)
    student, average = make(teacher, starts=starts), make(teacher, seed=5, starts=starts)
    guidance = ARDiffusion.from_teacher(teacher, width=16, depth=2)
    preview = make_preview(student, teacher, tmp_path / "previews", guidance=guidance)
    shown = preview(average, 7).pictures["preview"]
    assert np.array_equal(np.asarray(shown), np.asarray(Image.open(tmp_path / "previews" / "0000007.png")))
    noise_NLC, labels_N, ids_NL = (part[:8] for part in preview.kept)
    assert labels_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert torch.equal(ids_NL, resolve(teacher, noise_NLC, labels_N, **as_dict(teacher.recipe), num_steps=8))
    first = average.emit(noise_NLC, labels_N, 0, teacher.length)
    later = torch.cat([first[:, : starts[1]], noise_NLC[:, starts[1] :]], 1)
    second = torch.cat([first[:, : starts[1]], average.emit(later, labels_N, starts[1], teacher.length)], 1)
    guided_NL = guidance.sample(noise_NLC, labels_N, teacher.codebook_VC)
    with torch.no_grad():
        expected = [to_uint8(teacher.tokenizer.decode(codes)) for codes in (ids_NL, first, second, guided_NL)]
    bands = bands_of(tmp_path / "previews" / "0000007.png", expected[0].shape[1], rows=4)
    assert bands.shape[:3] == (2, 4, 4)
    for row, images in enumerate(expected):
        gap = np.abs(bands[:, row].reshape(images.shape).astype(int) - images)
        assert gap.max() <= 1, (row, gap.max())  # batches of other sizes round otherwise


def test_rows_that_there_are_no_networks_for_are_left_out(teacher: Teacher, tmp_path: Path) -> None:
    student = make_student(teacher, starts=(0,))
    make_preview(student, teacher, tmp_path)(student, 1)
    assert bands_of(tmp_path / "0000001.png", 8, rows=2).shape[:3] == (2, 2, 4)


def test_passes_are_the_pipelines(student: Student, teacher: Teacher) -> None:
    pipe, labels = DistilledPipeline(tokenizer=teacher.tokenizer, student=student), [0, 3]
    for passes in (1, 2):
        noise = torch.stack([torch.randn(L, 8, generator=seeded(s)) for s in (1, 2)])
        generators = [seeded(s) for s in (1, 2)]
        theirs = pipe(labels, num_inference_steps=passes, generator=generators, output_type="latent").images
        assert torch.equal(emitted(student, passes, noise, torch.tensor(labels)), theirs)


def test_losses_are_of_a_pass_from_noise_with_either_weights(teacher: Teacher, tmp_path: Path) -> None:
    student, average = make_student(teacher).train(), make_student(teacher, seed=5).eval()
    preview = make_preview(student, teacher, tmp_path)
    metrics = preview(average, 1).metrics
    noise_NLC, labels_N, ids_NL = preview.kept
    for name, model in (("raw", student), ("ema", average)):
        logits_NLV = model.predict(noise_NLC, labels_N).logits_BLV
        cross_entropy = F.cross_entropy(logits_NLV.flatten(0, 1), ids_NL.flatten()).item()
        accuracy = (logits_NLV.argmax(-1) == ids_NL).float().mean().item()
        assert metrics[f"heldout_{name}"] == pytest.approx(cross_entropy, rel=1e-5)
        assert metrics[f"heldout_accuracy_{name}"] == pytest.approx(accuracy)
    assert len(metrics) == 4 and metrics["heldout_raw"] != metrics["heldout_ema"]
    assert student.training and all(p.requires_grad and p.grad is None for p in student.parameters())
    assert preview(average, 2).metrics == metrics


def test_losses_of_a_student_that_is_trained_by_teacher_forcing_are_so_too(teacher: Teacher, tmp_path: Path) -> None:
    student = make_wavefront_student(teacher)
    preview = make_preview(student, teacher, tmp_path, teacher_forcing=True)
    noise_NLC, labels_N, ids_NL = preview.kept
    told = student(noise_NLC, labels_N, torch.zeros_like(labels_N), told_BL=ids_NL).logits_BLV
    expected = F.cross_entropy(told.flatten(0, 1), ids_NL.flatten()).item()
    assert preview(student, 1).metrics["heldout_ema"] == pytest.approx(expected, rel=1e-5)
    own = make_preview(student, teacher, tmp_path)(student, 1).metrics["heldout_ema"]
    assert own != pytest.approx(expected, rel=1e-3), "was told"


def test_the_teacher_is_walked_once_and_not_before_the_first_preview(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(previews, "resolve", lambda *a, **options: (calls.append(1), resolve(*a, **options))[1])
    student = make_student(teacher)
    preview = make_preview(student, teacher, tmp_path)
    assert not calls
    for step in (1, 2):
        preview(student, step)
    assert len(calls) == 4  # ten sequences, three at once


def test_no_pairs_share_the_noise(teacher: Teacher) -> None:
    manifest = make_manifest(teacher, "m", "h", PairsConfig(num=50, seed=3))
    pairs = {sample_seed(manifest.seed, i) for i in range(manifest.num)}
    preview = make_preview(make_student(teacher), teacher, Path("unused"))
    seeds = [derived_seed(3, 3, 1 + i) for i in range(10)]
    assert torch.equal(preview.kept[0], noise_of(seeds, (L, 8)))
    assert len(set(seeds)) == 10 and not pairs & set(seeds)
