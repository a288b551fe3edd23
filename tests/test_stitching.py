"""Plans that stitch several teachers and students, and the control that skips the rest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import C, L, make_pipeline, make_student, make_teacher, save_tiny, seeded
from torch import Tensor

from ddecode.cli import main
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import parse_plan
from ddecode.sampling import Skip, execute
from ddecode.teacher import Recipe, Teacher, inverse_cdf

LABELS = torch.tensor([1, 3])
UNIFORMS = torch.rand(2, L, generator=seeded(1))
RECIPE = Recipe(guidance_scale=2.0, top_k=10)


@pytest.fixture
def small(teacher: Teacher) -> Teacher:
    """Another teacher of the same tokens: one layer."""
    other = make_teacher(seed=4, depth=1)
    return Teacher(other.backbone, teacher.tokenizer, family=other.family)


def run(plan: str, **models: Any) -> Tensor:
    noise_BLC = torch.randn(2, L, C, generator=seeded(0))
    chosen = parse_plan(plan, L)
    progress = execute(chosen, models, noise_BLC=noise_BLC, uniforms_BL=UNIFORMS, labels=LABELS, recipe=RECIPE)
    return progress.embeddings_BLC


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_each_model_walks_its_own_span_from_the_others_tokens(
    order: tuple[str, str], teacher: Teacher, small: Teacher
) -> None:
    models = {"small": small, "large": teacher}
    first, second = (models[name] for name in order)
    begun = first.walk(LABELS, inverse_cdf(UNIFORMS), RECIPE, stop=7)
    expected = second.walk(LABELS, inverse_cdf(UNIFORMS), RECIPE, resolved_BN=begun)
    stitched = run(f"{order[0]}:0-7,{order[1]}:7-16", **models)
    assert torch.equal(stitched, teacher.codebook_VC[expected])
    for name in order:
        assert not torch.equal(stitched, run(f"{name}:0-16", **models)), "the other model had its part"


def test_skipping_emits_nothing_at_no_cost(pipe: DistilledPipeline) -> None:
    whole = pipe([1, 3], num_inference_steps="teacher", generator=seeded(0), output_type="latent").images
    skipped = pipe([1, 3], plan="teacher:0-11,skip:11-16", generator=seeded(0), output_type="latent")
    assert torch.equal(skipped.images[:, :11], whole[:, :11]) and not skipped.images[:, 11:].any()
    assert skipped.network_evaluations == 11


def test_a_pipeline_takes_others_of_the_same_codes_only(pipe: DistilledPipeline, small: Teacher) -> None:
    alone = {"tokenizer": pipe.tokenizer, "teacher": pipe.teacher}
    mixed = DistilledPipeline(**alone, others={"small": small, "light": make_student(pipe.teacher, depth=1)})
    assert list(mixed.models) == ["teacher", "map", "small", "light", "skip"]
    assert mixed([0], plan="light:0-16,small:4-9,teacher:9-16", output_type="np").network_evaluations == 1 + 5 + 7
    with pytest.raises(ValueError, match="stranger has another codebook"):
        DistilledPipeline(**alone, others={"stranger": make_teacher(seed=9)})
    for name in ("teacher", "student", "map", "skip"):
        with pytest.raises(ValueError, match=name):
            DistilledPipeline(**alone, others={name: small})
    with pytest.raises(ValueError, match="no model 'medium'; there are teacher, map, small, light, skip"):
        mixed.plan(plan="medium:0-16")
    with pytest.raises(ValueError, match="the plan is for 16 tokens, long has 17"):
        DistilledPipeline(**alone, others={"long": Skip(length=L + 1)}).plan(plan="teacher:0-4,long:4-16")


def test_a_folder_may_name_other_models(pipe: DistilledPipeline, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", DistilledPipeline(tokenizer=pipe.tokenizer, teacher=pipe.teacher))
    model = save_tiny(tmp_path / "model", pipe)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"others": {"small": str(small)}}))
    again = DistilledPipeline.from_pretrained(model)
    assert list(again.models) == ["student", "teacher", "map", "small", "skip"]
    a, b = (
        again([0, 1], plan=plan, generator=seeded(2), output_type="latent").images
        for plan in ("small:0-16", "teacher:0-16")
    )
    assert torch.equal(a, b)
    for wrong in ({"small": 3}, ["small"], {"small": "nowhere"}):
        (model / "config.json").write_text(json.dumps(config | {"others": wrong}))
        with pytest.raises(ValueError, match=r"others|nowhere"):
            DistilledPipeline.from_pretrained(model)


def test_the_command_line_brings_models_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = make_pipeline()
    model = save_tiny(tmp_path / "model", pipe)
    plan, out = "friend:0-16,twin:4-9,teacher:9-16", tmp_path / "a.npz"
    arguments = ["sample", str(model), "--plan", plan, "--num", "3", "--out", str(out)]
    assert main([*arguments, "--with", f"friend={model}#student", "--with", f"twin={model}"]) == 0
    expected = tmp_path / "b.npz"
    own = ["--plan", "student:0-16,teacher:4-9,teacher:9-16", "--num", "3", "--out", str(expected)]
    assert main(["sample", str(model), *own]) == 0
    np.testing.assert_array_equal(np.load(out)["arr_0"], np.load(expected)["arr_0"])
    capsys.readouterr()
    for wrong, message in (
        ("friend", "NAME=MODEL"),
        ("1=x", "NAME=MODEL"),
        (f"friend={model}#head", "teacher or student"),
        ("friend=nowhere", "unknown model 'nowhere'"),
        (f"teacher={model}", "plans mean another model by 'teacher'"),
    ):
        assert main([*arguments, "--with", wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_the_table_of_switch_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "tools"))
    from measure_stitching import switch_points

    assert switch_points((1, 4, 9, 16), 7) == [1, 5, 14]
    assert switch_points((1,) * 64, 7) == [8, 16, 24, 32, 40, 48, 56]
    assert json.dumps(switch_points((1,) * 64, 3)) == "[16, 32, 48]"
