"""Properties over whole ranges: plans as they are run, configs as they are written, shapes at every public border.

B batch, L token positions, V codes, C code width.
"""

import dataclasses
import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import C, L, V, distill_recipe, make_scale_teacher, make_student, make_teacher, seeded, write_yaml

from ddecode.arguments import check_finite, check_whole, shown
from ddecode.codebook import code_vectors
from ddecode.config import DistillConfig, as_yaml, build, read_config
from ddecode.flow import noise_to_tokens
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan, Span, student_plan
from ddecode.sampling import passes
from ddecode.teacher import Recipe
from ddecode.trajectory import resolve
from ddecode.yaml_text import as_text, parse_yaml

quick = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
TEACHER = make_teacher()
STUDENT = make_student(TEACHER, split=10)
PIPE = DistilledPipeline(tokenizer=TEACHER.tokenizer, teacher=TEACHER, student=STUDENT)
SCALES = make_scale_teacher()

# --- plans ----------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans that the tiny pipeline can run."""
    spans, resolved = [], 0
    while resolved < L:
        name = draw(st.sampled_from(["student", "teacher", "skip"]))
        begins = [start for start in STUDENT.starts if start <= resolved] if name == "student" else range(resolved + 1)
        start = draw(st.sampled_from(list(begins)))
        stop = draw(st.integers(start + 1, L)) if len(spans) < 3 else L
        spans.append(Span(who=name, start=start, stop=stop))
        resolved = stop
    return Plan(spans=tuple(spans), length=L)


@settings(quick, max_examples=15)
@given(plans(), st.integers(1, 2), st.integers(0, 99))
def test_plans_are_run_as_they_read(plan: Plan, batch: int, seed: int) -> None:
    """All positions are emitted, passes add up, and what a span does not touch stays as the spans before it left it."""
    heard: list[tuple[int, torch.Tensor]] = []

    def hear(pipe: Any, index: int, resolved: int, tensors: dict[str, torch.Tensor]) -> None:
        assert index == len(heard)
        heard.append((resolved, tensors["embeddings_BLC"].clone()))

    labels = list(range(batch))
    watched = PIPE(labels, plan=plan, generator=seeded(seed), output_type="latent", callback_on_step_end=hear)
    plain = PIPE(labels, plan=str(plan), generator=seeded(seed), output_type="latent")
    torch.testing.assert_close(watched.images, plain.images, atol=1e-4, rtol=1e-4)
    assert plain.images.shape == (batch, L, C) and plain.images.isfinite().all()
    count = sum(passes(PIPE.models[span.who], span) for span in plan.spans)
    assert watched.network_evaluations == plain.network_evaluations == count == len(heard)
    for resolved, embeddings in heard:
        assert not embeddings[:, max(resolved, *(span.stop for span in plan.spans)) :].any()
    last = plan.spans[-1]
    if last.who == "skip":
        assert not plain.images[:, last.start :].any()


@quick
@given(st.lists(st.integers(0, L - 1), min_size=1, max_size=6, unique=True).map(sorted), st.integers(-3, 9))
def test_default_plans_have_as_many_passes_as_asked(starts: list[int], steps: int) -> None:
    starts = sorted({0, *starts})
    if not 1 <= steps <= len(starts):
        with pytest.raises(ValueError, match=f"1 to {len(starts)} steps"):
            student_plan(steps, starts, L)
        return
    plan = student_plan(steps, starts, L)
    assert [span.start for span in plan.spans] == starts[:steps] and all(span.stop == L for span in plan.spans)


@quick
@given(st.lists(st.tuples(st.integers(-2, L + 2), st.integers(-2, L + 2)), max_size=4), st.integers(-1, L + 1))
def test_spans_are_a_plan_or_refused(pairs: list[tuple[int, int]], length: int) -> None:
    spans = tuple(Span(who="student", start=start, stop=stop) for start, stop in pairs)
    try:
        plan = Plan(spans=spans, length=length)
    except ValueError:
        resolved = 0
        for start, stop in pairs:
            if not (0 <= start <= resolved and start < stop <= length):
                return
            resolved = stop
        assert not pairs or resolved != length
        return
    assert {position for span in plan.spans for position in range(span.start, span.stop)} == set(range(length))


@quick
@given(st.integers(-2, 10), st.integers(-2, 10))
def test_a_teachers_spans_fall_on_its_steps(start: int, stop: int) -> None:
    boundaries = (0, 1, 4, 8)  # of steps of 1, 3 and 4 tokens
    if start in boundaries and stop in boundaries and start < stop:
        assert passes(SCALES, Span(who="t", start=start, stop=stop)) == boundaries.index(stop) - boundaries.index(start)
    elif start not in boundaries or stop not in boundaries:
        with pytest.raises(ValueError, match=r"no step boundary .* \[0, 1, 4, 8\]"):
            passes(SCALES, Span(who="t", start=start, stop=stop))


# --- configs --------------------------------------------------------------------------------------------------

names = st.text(string.ascii_letters + "_-. é", min_size=1, max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
recipes = st.builds(
    Recipe, guidance_scale=st.floats(0, 1000), top_k=st.integers(0, 2**31 - 1), top_p=st.floats(1e-6, 1)
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    path = tmp_path_factory.mktemp("configs") / "recipe.yaml"
    return read_config(write_yaml(path, distill_recipe(Path("somewhere"))), DistillConfig)


@quick
@given(
    seed=st.integers(0, 2**63 - 1),
    lr=st.floats(1e-12, 1e12),
    ema_decay=st.floats(0, 1, exclude_max=True),
    weight=st.floats(0, 1e9)
    | st.dictionaries(st.floats(0, 1, exclude_max=True), st.floats(0, 1e9), min_size=1, max_size=3),
    starts=st.lists(st.integers(1, 2**31), max_size=3, unique=True).map(lambda rest: (0, *sorted(rest))),
    recipe=st.none() | recipes,
    teacher=st.text(max_size=20).filter(lambda text: text.isprintable()),
    expected=st.dictionaries(names, st.integers(-9, 9) | names, max_size=2),
)
def test_configs_read_as_they_are_written(config: DistillConfig, tmp_path_factory: Any, **parts: Any) -> None:
    """Every number to its last bit, every text, whatever YAML would read into them."""
    changed = dataclasses.replace(
        config,
        teacher=parts["teacher"],
        training=dataclasses.replace(config.training, **{k: parts[k] for k in ("seed", "lr", "ema_decay")}),
        objective=dataclasses.replace(config.objective, energy=parts["weight"]),
        student=dataclasses.replace(config.student, starts=parts["starts"]),
        pairs=dataclasses.replace(config.pairs, recipe=parts["recipe"]),
        expected=parts["expected"],
    )
    assert build(DistillConfig, parse_yaml(as_yaml(changed), "it"), "") == changed


@quick
@given(st.dictionaries(st.sampled_from(["teacher", "pairs", "student", "objective", "training", "trainin"]), trees))
def test_any_tree_is_a_config_or_one_line(tree: dict[str, Any]) -> None:
    try:
        build(DistillConfig, tree, "")
    except ValueError as error:
        assert 0 < len(str(error)) < 600 and "\n" not in str(error)


@quick
@given(st.text(max_size=60) | st.text("{}[]:,-&*!|>'\"# \n\tab0.", max_size=40))
def test_any_text_is_yaml_or_one_line(text: str) -> None:
    try:
        tree = parse_yaml(text, "it")
    except ValueError as error:
        assert str(error).startswith("it is no YAML: ") and "\n" not in str(error)
        return
    assert parse_yaml(as_text(tree), "it") == tree or "nan" in str(tree).lower() or "timezone" in repr(tree)


@quick
@given(st.sampled_from(["steps", "batch", "warmup_steps", "weight_decay", "clip_norm", "log_every"]), st.data())
def test_a_slip_of_a_key_is_told_the_nearest(name: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(1, len(name) - 1))
    slip = name[:place] + data.draw(st.sampled_from("xqz")) + name[place:]
    with pytest.raises(ValueError, match=rf"unknown config key training\.{slip}; did you mean training\.{name}\?"):
        build(DistillConfig, {"training": {slip: 1}} | dict.fromkeys(("teacher", "pairs", "student", "objective")), "")


@quick
@given(scalars, st.integers(-5, 5), st.integers(0, 9))
def test_numbers_are_whole_finite_and_in_range_or_refused(value: Any, lowest: int, more: int) -> None:
    def taken(check: Any, *arguments: Any) -> bool:
        try:
            check("x", value, *arguments)
        except ValueError as error:
            assert str(error).startswith("x must be ") and shown(value) in str(error)
            return False
        return True

    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_whole = isinstance(value, int) and is_number
    assert taken(check_whole, lowest, lowest + more) == (is_whole and lowest <= value <= lowest + more)
    assert taken(check_finite) == (is_number and ((is_whole and abs(value) < 2**1000) or math.isfinite(value)))


# --- shapes ---------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(0, 3) | st.sampled_from([L - 1, L, L + 1, C, C - 1, V]), max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                          torch.bool, torch.uint8, torch.complex64])  # fmt: skip
fills = st.sampled_from([0, 1, -1, V, 2**40, math.nan, math.inf])


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """Of this shape, floating and finite, or with something about it changed."""
    dtype = draw(st.just(torch.float32) | dtypes)
    fill = draw(st.just(0) | fills)
    if not dtype.is_floating_point and not (isinstance(fill, int) and abs(fill) < 100):
        fill = 0
    device = draw(st.sampled_from(["cpu"] * 5 + ["meta"]))
    return torch.full(
        draw(st.just(list(shape)) | sizes), abs(fill) if dtype == torch.uint8 else fill, dtype=dtype, device=device
    )


def check(function: Any, given: torch.Tensor, fits: bool, shape: tuple[int, ...]) -> None:
    """What fits gives a result of this shape; all else is one line."""
    if fits:
        assert tuple(function(given).shape) == shape
        return
    with pytest.raises(ValueError) as caught:
        function(given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def are_vectors(tensor: torch.Tensor, *, finite: bool = True) -> bool:
    fits = tensor.is_floating_point() and tensor.dim() == 3 and tuple(tensor.shape[1:]) == (L, C)
    return fits and not tensor.is_meta and (not finite or (len(tensor) > 0 and bool(tensor.isfinite().all())))


@quick
@given(tensors((2, L, C)))
def test_noise_and_sequences_of_any_shape(tensor: torch.Tensor) -> None:
    fits, batch = are_vectors(tensor), len(tensor) if tensor.dim() else 0
    check(lambda noise: resolve(TEACHER, noise, 0, num_steps=2), tensor, fits, (batch, L))
    check(lambda sequence: STUDENT.predict(sequence, 0).logits_BLV, tensor, fits, (batch, L, V))


@quick
@given(tensors((2, L)), tensors((2, L, C)))
def test_ids_of_any_shape(ids: torch.Tensor, embeddings: torch.Tensor) -> None:
    for tensor in (
        ids,
        ids.long() if not ids.is_meta and not ids.is_complex() and ids.isfinite().all() else ids,
        embeddings,
    ):
        is_ids = tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 2 and not tensor.is_meta
        is_ids = is_ids and bool(((tensor >= 0) & (tensor < V)).all())
        batch = len(tensor) if tensor.dim() else 0
        if batch:
            check(lambda x: TEACHER.logits(x, 0), tensor, is_ids and tensor.shape[1] == L, (batch, L, V))
        is_codes = tensor.is_floating_point() and tensor.dim() == 3 and tensor.shape[2] == C
        shape = (*tensor.shape[:2], C)
        check(lambda x: code_vectors(x, TEACHER.codebook_VC), tensor, is_ids or is_codes, shape)


@quick
@given(tensors((1, 3, 8, 8)))
def test_images_of_any_shape(images: torch.Tensor) -> None:
    fits = images.is_floating_point() and images.dim() == 4 and images.shape[1] == 3 and not images.is_meta
    fits = fits and all(side > 0 and side % 2 == 0 for side in images.shape[2:]) and bool(images.isfinite().all())
    if not fits or images.dtype == torch.float32:
        tokens = images.shape[2] * images.shape[3] // 4 if fits else 0
        check(TEACHER.tokenizer.encode, images, fits, (len(images) if fits else 0, tokens))


@quick
@given(tensors((2, 3, C)), tensors((2, 3, V)), tensors((V, C)))
def test_the_map_takes_matching_finite_tensors(
    noise: torch.Tensor, log_probs: torch.Tensor, codes: torch.Tensor
) -> None:
    given = (noise, log_probs, codes)
    fits = all(t.is_floating_point() and not t.is_meta for t in given) and noise.dim() == 3 and codes.dim() == 2
    fits = fits and codes.numel() > 0 and noise.shape[2] == codes.shape[1]
    fits = fits and log_probs.shape == (*noise.shape[:2], len(codes))
    fits = fits and all(bool(t.isfinite().all()) for t in given)
    check(lambda x: noise_to_tokens(x, log_probs, codes, 2), noise, fits, tuple(noise.shape[:2]))


@quick
@given(scalars | st.lists(scalars, max_size=3) | st.lists(st.integers(-1, 6), max_size=4).map(tuple))
def test_labels_of_any_kind(labels: Any) -> None:
    flat = [labels] if isinstance(labels, int) else labels
    fits = isinstance(flat, list | tuple) and len(flat) > 0
    fits = fits and all(isinstance(label, int) and 0 <= label <= TEACHER.num_classes for label in flat)
    if labels is not None and not (fits and any(isinstance(label, bool) for label in flat)):
        check(lambda x: TEACHER.labels(x, None), labels, fits, (len(flat),) if fits else ())
