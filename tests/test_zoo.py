"""The bundled models: they load by name, their parts belong together, and the demo runs on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddecode import DistilledPipeline, load_teacher
from ddecode.checkpoint import ModelFolder, bundled_models, zoo_folder
from ddecode.config import DistillConfig, read_config
from ddecode.demo import DemoSize, run_demo
from ddecode.evaluation.zoo import Judge, evaluate
from ddecode.teacher import Teacher

ROOT = Path(__file__).parent.parent
NAMES = ("fashion-llamagen", "fashion-var")
LEAST_FOUND = {"fashion-llamagen": 0.5, "fashion-var": 0.1}
"""Shares of tokens; in residual scales one token that changes moves all after it. Chance is 0.002."""


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(name: str) -> DistilledPipeline:
    return DistilledPipeline.from_pretrained(name)


def test_a_bundled_model_is_small_and_complete(name: str) -> None:
    assert name in bundled_models()
    folder = zoo_folder() / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    assert all(ModelFolder.open(name).has(part) for part in ("tokenizer", "teacher", "student"))
    assert (folder / "README.md").read_text().startswith(f"# {name}")


def test_its_recipe_is_the_one_in_configs(name: str) -> None:
    assert (zoo_folder() / name / "recipe.yaml").read_text() == (ROOT / "configs" / f"{name}.yaml").read_text()


def test_a_small_teacher_of_the_same_tokens_stitches_with_it(name: str, pipe: DistilledPipeline) -> None:
    assert (zoo_folder() / f"{name}-small" / "README.md").read_text().startswith(f"# {name}-small")
    small, teacher = pipe.others["small"], pipe.teacher
    assert isinstance(small, Teacher) and teacher is not None and small.backbone.depth < teacher.backbone.depth
    switch = sum(teacher.steps[: len(teacher.steps) // 2])
    both = pipe([0, 1], plan=f"small:0-{switch},teacher:{switch}-{pipe.length}", output_type="np")
    assert both.network_evaluations == len(teacher.steps)


def test_tokenizer_round_trip_keeps_most_tokens(name: str, pipe: DistilledPipeline) -> None:
    """Tokens of a decoded image are found again far above chance: encoder, codebook and decoder belong together."""
    ids = load_teacher(name).generate(list(range(10)), guidance_scale=1.5, generator=torch.Generator().manual_seed(0))
    images = pipe.tokenizer.decode(ids)
    assert (images[:, 0] - images[:, 1]).abs().max() < 1e-4
    assert (pipe.tokenizer.encode(images) == ids).float().mean() > LEAST_FOUND[name]


def test_student_is_far_better_than_independent_tokens(name: str, pipe: DistilledPipeline) -> None:
    """A coarse guard at n = 400 of the figures in the README, which `ddecode eval` measures at 5000."""
    judge = Judge.open(zoo_folder() / "features" / "fashion-eval")
    plans = {"1": pipe.plan(1), "2": pipe.plan(2)}
    result = evaluate(pipe, plans, judge, model=name, num=400, show_progress=False)
    rows = {row.plan: row for row in result.rows}
    assert rows["control"].control_share == pytest.approx(1.0)
    for name in ("1", "2"):
        assert rows[name].control_share is not None and rows[name].control_share < 0.15
        assert rows[name].accuracy > rows["teacher"].accuracy - 0.06


def test_the_light_student_is_of_the_same_tokens_and_not_far_behind() -> None:
    """A coarse guard at n = 400, as above."""
    light, full = (DistilledPipeline.from_pretrained(name) for name in ("fashion-var-light", "fashion-var"))
    assert light.student is not None and full.student is not None and light.teacher is None
    assert 2 * light.student.backbone.depth <= full.student.backbone.depth
    assert torch.equal(light.tokenizer.codebook_VC, full.tokenizer.codebook_VC)
    assert len(light([0, 1], num_inference_steps=1).images) == 2
    both = DistilledPipeline(tokenizer=full.tokenizer, teacher=full.teacher, others={"light": light.student})
    judge = Judge.open(zoo_folder() / "features" / "fashion-eval")
    plans = {"light": both.plan(plan=f"light:0-{full.length}")}
    result = evaluate(both, plans, judge, model="fashion-var", num=400, show_progress=False)
    row = next(row for row in result.rows if row.plan == "light")
    assert row.control_share is not None and row.control_share < 0.15
    assert (zoo_folder() / "fashion-var-light" / "README.md").read_text().startswith("# fashion-var-light")


def test_demo_writes_a_report_that_needs_no_network(name: str, tmp_path: Path) -> None:
    config = read_config(zoo_folder() / name / "recipe.yaml", DistillConfig)
    size = DemoSize(pairs=40, steps=3, batch=8, samples=40, repeats=1)
    report = run_demo(config, tmp_path / "demo", size)
    text = report.read_text()
    assert text.count("data:image/png;base64,") == 4
    assert "http" not in text
    assert set(json.loads((tmp_path / "demo" / "demo.json").read_text())) == {"rows", "timing"}
    with pytest.raises(ValueError, match="not empty"):
        run_demo(config, tmp_path / "demo", size)


def test_samples_depend_on_seed_and_index_alone(pipe: DistilledPipeline) -> None:
    generators = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    three = pipe([0, 1, 2], generator=generators, output_type="np").images
    alone = pipe([1], generator=[torch.Generator().manual_seed(2)], output_type="np").images
    assert np.abs(three[1].astype(int) - alone[0].astype(int)).max() <= 1
