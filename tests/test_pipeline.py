"""The pipeline: forms of its output, where its randomness comes from, what it refuses, and its way to disk and back."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    C,
    L,
    make_draft_student,
    make_pipeline,
    make_staggered_student,
    make_student,
    make_teacher,
    make_var_student,
    make_var_teacher,
    make_wavefront_student,
    save_tiny,
    seeded,
)

from ddecode.images import to_uint8
from ddecode.mapped_student import MappedStudent
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import parse_plan
from ddecode.teacher import Recipe, Teacher
from ddecode.trajectory import resolve


def test_the_same_images_in_every_form(pipe: DistilledPipeline) -> None:
    outputs: dict[str, Any] = {
        form: pipe([3, 1, 2], generator=seeded(0), output_type=form).images for form in ("pil", "np", "pt", "latent")
    }
    latent = outputs["latent"]
    assert latent.shape == (3, L, C) and latent.dtype == torch.float32
    decoded = pipe.tokenizer.decode(latent)
    assert decoded.abs().max() > 1, "this decoder does not clamp, so the test can tell who does"
    clamped = decoded.clamp(-1, 1)
    assert outputs["np"].shape == (3, 8, 8, 3) and outputs["np"].dtype == np.uint8
    expected = ((clamped + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    np.testing.assert_array_equal(outputs["np"], expected)
    assert outputs["pt"].dtype == torch.float32
    torch.testing.assert_close(outputs["pt"], (clamped + 1) / 2)
    assert [type(image) for image in outputs["pil"]] == [Image.Image] * 3
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in outputs["pil"]]), outputs["np"])
    assert isinstance(pipe(0).images[0], Image.Image)


def test_rounding() -> None:
    x = torch.tensor([-2.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.001, 1.0, 7.0]).view(1, 1, 1, 7)
    assert to_uint8(x.expand(1, 3, 1, 7))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize("plan", ["student:0-16,student:4-16", "teacher:0-16", "student:0-4,teacher:4-9,teacher:9-16"])
def test_image_i_depends_on_its_own_generator_alone(pipe: DistilledPipeline, plan: str) -> None:
    together = pipe([0, 1, 2], plan=plan, generator=[seeded(i) for i in range(3)], output_type="latent").images
    for i in range(3):
        alone = pipe(i, plan=plan, generator=seeded(i), output_type="latent").images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, "teacher"])
def test_noise_does_not_follow_torchs_default_dtype(pipe: DistilledPipeline, steps: Any) -> None:
    expected = pipe([0, 1], num_inference_steps=steps, generator=seeded(0), output_type="latent").images
    torch.set_default_dtype(torch.float64)
    try:
        images = pipe([0, 1], num_inference_steps=steps, generator=seeded(0), output_type="latent").images
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(images, expected)


def test_one_generator_draws_the_noise_sample_by_sample(pipe: DistilledPipeline) -> None:
    g = seeded(5)
    noise = torch.stack([torch.randn(L, C, generator=g) for _ in range(3)])
    prediction = pipe.student.predict(noise, [0, 1, 2])
    expected = pipe.student.codebook_VC[prediction.logits_BLV.argmax(-1)]
    torch.testing.assert_close(pipe([0, 1, 2], generator=seeded(5), output_type="latent").images, expected)
    torch.testing.assert_close(pipe([0], generator=seeded(5), output_type="latent").images, expected[:1])


def test_without_generator_torchs_own_serves(pipe: DistilledPipeline) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        images = pipe([0, 1], output_type="latent").images
    assert torch.equal(images, pipe([0, 1], generator=seeded(3), output_type="latent").images)


@pytest.mark.parametrize("kind", ["split", "drafts", "exits", "wavefront"])
def test_a_network_that_overflows_gives_no_picture(kind: str) -> None:
    teacher = make_var_teacher() if kind == "exits" else make_teacher()
    made = {
        "split": make_student, "drafts": make_draft_student, "exits": make_staggered_student,
        "wavefront": make_wavefront_student,
    }[kind](teacher)  # fmt: skip
    pipe = DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher, student=made)
    plans = [f"student:0-{pipe.length}", f"teacher:0-{pipe.length}", f"map:0-{pipe.length}"]
    for plan in plans:
        pipe([0, 1], plan=plan)
    for network in (made.backbone, teacher.backbone):
        next(parameter for parameter in network.parameters() if parameter.dim() == 2).data.fill_(torch.nan)
    for plan in plans:
        with pytest.raises(ValueError, match="logits are not finite: its weights are damaged"):
            pipe([0, 1], plan=plan)


def test_step_numbers_are_short_for_plans(pipe: DistilledPipeline) -> None:
    def images(**options: Any) -> torch.Tensor:
        return pipe([2, 0], generator=seeded(1), output_type="latent", **options).images

    assert torch.equal(images(), images(num_inference_steps=1))
    assert torch.equal(images(), images(plan="student:0-16"))
    assert torch.equal(images(num_inference_steps=2), images(plan="student:0-16,student:4-16"))
    assert torch.equal(images(num_inference_steps="teacher"), images(plan="teacher:0-16"))
    assert torch.equal(images(num_inference_steps=2), images(plan=pipe.plan(2)))
    assert pipe([2], num_inference_steps=2).network_evaluations == 2
    assert pipe([2], plan="student:0-4,teacher:4-9,teacher:9-16").network_evaluations == 13


def test_the_teacher_through_its_map_is_what_pairs_hold() -> None:
    pipe = make_pipeline()
    labels, noise = [0, 3, 1], torch.stack([torch.randn(L, C, generator=seeded(i)) for i in range(3)])
    generators = [seeded(i) for i in range(3)]
    ids = resolve(pipe.teacher, noise, labels, **vars(pipe.recipe))
    codes = torch.nn.functional.embedding(ids, pipe.student.codebook_VC)

    def emitted(plan: str) -> torch.Tensor:
        return pipe(labels, plan=plan, generator=[seeded(i) for i in range(3)], output_type="latent").images

    assert torch.equal(emitted("map:0-16"), codes)
    assert torch.equal(emitted("map:0-5,map:5-16"), codes), "each span goes on with its own noise"
    behind = emitted("student:0-5,map:5-16")
    assert torch.equal(behind[:, :5], emitted("student:0-16")[:, :5]) and not torch.equal(behind, codes)
    assert pipe(labels, plan="map:0-16", generator=generators).network_evaluations == 16
    alone = DistilledPipeline(tokenizer=pipe.tokenizer, student=pipe.student)
    with pytest.raises(ValueError, match="map"):
        alone(labels, plan="map:0-16")
    with pytest.raises(ValueError, match="plans mean another model by 'map'"):
        DistilledPipeline(tokenizer=pipe.tokenizer, student=pipe.student, others={"map": pipe.teacher})


def test_teacher_spans_follow_the_recipe() -> None:
    pipe = make_pipeline()
    greedy = DistilledPipeline(tokenizer=pipe.tokenizer, teacher=pipe.teacher, recipe=Recipe(top_k=1))
    ids = pipe.teacher.generate([0, 1], top_k=1)
    images = greedy([0, 1], num_inference_steps="teacher", output_type="latent").images
    assert torch.equal(images, pipe.teacher.codebook_VC[ids])
    assert pipe.recipe == pipe.teacher.recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 1, "plan": "student:0-16"}, "not both"),
        ({"num_inference_steps": 3}, "1 to 2 steps"),
        ({"num_inference_steps": 0}, "1 to 2 steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"num_inference_steps": 1.0}, "num_inference_steps"),
        ({"num_inference_steps": "two"}, "num_inference_steps"),
        ({"plan": "student:0-8"}, "ends at 8"),
        ({"plan": "large:0-16"}, "no model 'large'"),
        ({"plan": parse_plan("student:0-8", 8)}, "8"),
        ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ({"class_labels": [0, 7]}, "class 7 is out of range: this model knows 0..3"),
        ({"class_labels": -1}, "class -1"),
        ({"generator": [seeded(0)]}, "1 generators for 2 samples"),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_wrong_input_is_refused(pipe: DistilledPipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [0, 1]} | options)


def test_a_pipeline_without_one_of_its_models_says_so(teacher: Teacher, pipe: DistilledPipeline) -> None:
    with pytest.raises(ValueError, match="needs a student or a teacher"):
        DistilledPipeline(tokenizer=teacher.tokenizer)
    with pytest.raises(ValueError, match="no student"):
        DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher)(0)
    with pytest.raises(ValueError, match="no teacher"):
        DistilledPipeline(tokenizer=teacher.tokenizer, student=pipe.student)(0, num_inference_steps="teacher")


def test_teachers_among_others_are_sampled_as_they_are_where_there_is_no_own() -> None:
    teacher = make_teacher(recipe=Recipe(guidance_scale=2.0, top_k=5))
    student = make_student(teacher)
    own = DistilledPipeline(tokenizer=teacher.tokenizer, student=student, teacher=teacher)
    light = DistilledPipeline(tokenizer=teacher.tokenizer, student=student, others={"big": teacher})
    for plan in ("student:0-4,{}:4-16", "{}:0-16"):
        images = (
            pipe([0, 1], plan=plan.format(name), generator=seeded(0), output_type="latent").images
            for pipe, name in ((own, "teacher"), (light, "big"))
        )
        assert torch.equal(*images)
    others = {"big": teacher, "small": make_teacher(recipe=Recipe())}
    with pytest.raises(ValueError, match="big, small are sampled differently: give DistilledPipeline a recipe for all"):
        DistilledPipeline(tokenizer=teacher.tokenizer, student=student, others=others)
    DistilledPipeline(tokenizer=teacher.tokenizer, student=student, others=others, recipe=Recipe())


def test_models_of_two_precisions_in_one_plan_are_refused() -> None:
    pipe = make_pipeline().to(torch.bfloat16)
    mixed = DistilledPipeline(tokenizer=pipe.tokenizer, student=pipe.student, others={"big": make_teacher()})
    mixed([0])
    with pytest.raises(ValueError, match=r"student torch\.bfloat16 on cpu, big torch\.float32 on cpu: bring all"):
        mixed([0], plan="student:0-4,big:4-16")
    mixed.to(torch.float32)([0], plan="student:0-4,big:4-16")


def test_to_disk_and_back(pipe: DistilledPipeline, model: Path) -> None:
    again = DistilledPipeline.from_pretrained(model)
    assert not any(part.training for part in (again.student, again.teacher.backbone, again.tokenizer))
    assert again.recipe == pipe.recipe and again.student.starts == (0, 4)
    for steps in (1, 2, "teacher"):
        a, b = (
            p([0, 3], num_inference_steps=steps, generator=seeded(2), output_type="pt").images for p in (pipe, again)
        )
        assert torch.equal(a, b)
    assert torch.equal(
        pipe([1], generator=seeded(0), output_type="latent").images,
        DistilledPipeline.from_pretrained(str(model))([1], generator=seeded(0), output_type="latent").images,
    )


def test_a_model_may_have_a_teacher_alone(pipe: DistilledPipeline, tmp_path: Path) -> None:
    alone = DistilledPipeline(tokenizer=pipe.tokenizer, teacher=pipe.teacher)
    again = DistilledPipeline.from_pretrained(save_tiny(tmp_path / "teacher", alone))
    assert again.student is None and list(again.models) == ["teacher", "map", "skip"]
    assert again([0], num_inference_steps="teacher", output_type="np").images.shape == (1, 8, 8, 3)


def pipeline_of(family: str, kind: str) -> DistilledPipeline:
    teacher = make_teacher() if family == "llamagen" else make_var_teacher()
    make = make_draft_student if kind == "drafts" else make_student if family == "llamagen" else make_var_student
    return DistilledPipeline(tokenizer=teacher.tokenizer, teacher=teacher, student=make(teacher, starts=(0, 5)).eval())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["split", "drafts"])
@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_half_precision_is_near_fp32(family: str, kind: str, dtype: torch.dtype) -> None:
    pipe = pipeline_of(family, kind)
    labels, steps = [0, 1, 2, 3] * 4, (1, 2, "teacher")

    def draw(form: str) -> list[torch.Tensor]:
        return [pipe(labels, num_inference_steps=n, generator=seeded(0), output_type=form).images for n in steps]

    exact, codes, decoded = draw("latent"), pipe.tokenizer.codebook_VC.clone(), pipe.decode(draw("latent")[0])
    assert pipe.to(dtype) is pipe and pipe.dtype == dtype
    assert torch.equal(pipe.tokenizer.codebook_VC, codes)
    assert {p.dtype for p in pipe.tokenizer.decoder.parameters()} == {dtype}
    assert {p.dtype for n, p in pipe.tokenizer.named_parameters() if not n.startswith("decoder.")} == {torch.float32}
    head = {id(p) for p in pipe.student.head()} if isinstance(pipe.student, MappedStudent) else set()
    cast = [p for m in (pipe.student, pipe.teacher.backbone) for p in m.parameters() if id(p) not in head]
    assert {p.dtype for p in cast} == {dtype}
    assert all(p.dtype == torch.float32 for p in pipe.student.parameters() if id(p) in head)
    assert all(b.dtype != dtype for m in (pipe.student, pipe.teacher.backbone) for b in m.buffers())
    for ours, theirs in zip(draw("latent"), exact, strict=True):
        near = torch.isclose(ours, theirs, atol=0.05).all(-1).float().mean()
        assert ours.dtype == torch.float32 and near > 0.7, f"{near:.0%} of the tokens are those of fp32"
    assert pipe.decode(exact[0]).dtype == torch.float32
    assert (pipe.decode(exact[0]) - decoded).abs().max() < 0.05 * decoded.abs().max()
    assert draw("pt")[0].dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu") and pipe.to(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ["fashion-llamagen", "fashion-var"])
def test_bf16_pictures_of_a_bundled_model_are_those_of_fp32_to_one_percent(name: str) -> None:
    pipe = DistilledPipeline.from_pretrained(name)

    def draw() -> torch.Tensor:
        return pipe([i % 10 for i in range(300)], generator=seeded(0), output_type="pt").images

    exact = draw()
    pipe.to(torch.bfloat16)
    assert 0 < (draw() - exact).abs().mean() < 0.01


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_a_decoder_in_half_precision_leaves_the_tokens_as_they_are(family: str) -> None:
    pipe = pipeline_of(family, "split")
    codes = pipe([0, 1], generator=seeded(0), output_type="latent").images
    exact = pipe.decode(codes)
    pipe.tokenizer.decoder.to(torch.bfloat16)
    assert pipe.dtype == torch.float32
    assert torch.equal(pipe([0, 1], generator=seeded(0), output_type="latent").images, codes)
    assert 0 < (pipe.decode(codes) - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(("family", "kind"), [("llamagen", "split"), ("var", "drafts")])
def test_compiled_students_equal_eager_ones(family: str, kind: str) -> None:
    """With all that dynamo does and no code generated: that takes long, and no part of it is ours."""
    pipe = pipeline_of(family, kind)

    def draw(batch: int) -> list[torch.Tensor]:
        return [
            pipe([0, 1, 2][:batch], num_inference_steps=n, generator=seeded(0), output_type="latent").images
            for n in (1, 2)
        ]

    eager = [draw(batch) for batch in (1, 3)]
    names = list(pipe.student.state_dict())
    assert pipe.compile(backend="eager") is pipe
    compiled_blocks = [m for m in pipe.student.modules() if m._compiled_call_impl is not None]
    assert len(compiled_blocks) == pipe.student.backbone.depth
    assert not any(m._compiled_call_impl for m in pipe.teacher.backbone.modules())
    for ours, theirs in zip([draw(batch) for batch in (1, 3)], eager, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert list(pipe.student.state_dict()) == names


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_student_compiled_to_machine_code_equals_the_eager_one() -> None:
    pipe = make_pipeline()
    exact = pipe([0, 1], generator=seeded(0), output_type="latent").images
    compiled = pipe.compile()([0, 1], generator=seeded(0), output_type="latent").images
    torch.testing.assert_close(compiled, exact, rtol=1e-4, atol=1e-4)


def test_to_takes_device_and_dtype_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipeline()
    cpu, half = torch.device("cpu"), torch.bfloat16
    for places, names in [
        ((cpu, half), {}),
        ((half, "cpu"), {}),
        (("cpu",), {"dtype": half}),
        ((half,), {"device": cpu}),
    ]:
        pipe.to(torch.float32)
        assert pipe.to(*places, **names) is pipe
        assert pipe.dtype == half and pipe.device == cpu
    assert pipe.to() is pipe and pipe.to("cpu").dtype == half
    monkeypatch.setattr("ddecode.pipeline.check_device", lambda device: None)  # it refuses the only other one here
    assert pipe.to("meta").device == pipe.teacher.device == torch.device("meta")
    pipe, alone = make_pipeline(), make_pipeline().student  # which has a tokenizer of its own, as `--with` reads it
    DistilledPipeline(tokenizer=pipe.tokenizer, teacher=pipe.teacher, others={"alone": alone}).to("meta")
    assert alone.device == alone.codebook_VC.device == torch.device("meta")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((torch.float64,), r"dtype must be one of .*torch\.bfloat16"),
        (("bf16",), "there is no device 'bf16' here"),
        (("cuda:97",), "there is no device 'cuda:97' here"),
        (("cpu", torch.device("cpu")), "one device and one dtype, got cpu, cpu"),
        ((torch.float16, torch.bfloat16), "one device and one dtype"),
    ],
    ids=str,
)
def test_other_places_are_refused(pipe: DistilledPipeline, places: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.to(*places)
    assert pipe.dtype == torch.float32


def test_a_bar_counts_the_passes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = DistilledPipeline.from_pretrained(model)
    pipe([0], num_inference_steps=2)
    assert capsys.readouterr().err == "", "a bar over two passes"
    pipe.set_progress_bar_config(disable=False)
    pipe([0], num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err
    pipe.set_progress_bar_config(desc="sampling", leave=False)
    pipe([0], num_inference_steps="teacher")
    assert "sampling" in (shown := capsys.readouterr().err) and "/16" in shown
    pipe.set_progress_bar_config(disable=True)
    pipe([0])
    assert capsys.readouterr().err == ""
