"""Configs: what is read, how a mistake is named, and that every recipe of the repository is valid."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from tiny import distill_recipe, write_yaml

from ddecode.checkpoint import family_module
from ddecode.config import DistillConfig, PairsConfig, StudentConfig, as_dict, build, chosen, read_config
from ddecode.objective_config import ObjectiveConfig
from ddecode.teacher import Recipe
from ddecode.training_config import TrainingConfig
from ddecode.weight import weight_at
from third_party_loaders.published import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "recipe.yaml", distill_recipe(Path("somewhere")))


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_is_valid(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if recipe.stem.endswith(("-teacher", "-small")):
        monkeypatch.syspath_prepend(ROOT / "tools")
        import train_teacher

        config = read_config(recipe, train_teacher.TeacherConfig)
        assert config.backbone and config.training.steps > 0
    else:
        config = read_config(recipe, DistillConfig)
        assert config.student.starts[0] == 0
        assert config.expected, "a recipe states what it reaches, or that this is not yet measured"


PUBLISHED = sorted(p for p in ROOT.glob("configs/*.yaml") if not p.name.startswith(("fashion", "own")))


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda path: path.name)
def test_recipes_of_published_models_fit_them(recipe: Path) -> None:
    config, architecture = read_config(recipe, DistillConfig), ARCHITECTURES[recipe.stem]
    backbone = architecture.backbone
    if recipe.stem == "llamagen-xl":  # timed at 256 pixels like the others, released at 384
        backbone = replace(backbone, tokens=576)
    steps = backbone.steps if architecture.family == "var" else (1,) * backbone.tokens
    boundaries = {sum(steps[:k]) for k in range(len(steps))}
    assert set(config.student.starts) <= boundaries and config.student.split in boundaries
    family = family_module(architecture.family)
    assert config.pairs.recipe == family.pairs_recipe(backbone)
    assert (config.student.starts, config.student.split) == family.student_spans(backbone)
    assert "not yet measured" in str(config.expected) and config.teacher == f"checkpoints/{recipe.stem}"


def test_every_family_of_published_sizes_has_its_recipe() -> None:
    assert {p.stem for p in PUBLISHED} >= {f"var-d{d}" for d in (16, 20, 24, 30, 36)}
    assert {p.stem for p in PUBLISHED} >= {f"llamagen-{size}" for size in ("b", "l", "xl")}


def test_values_arrive_with_their_types(path: Path) -> None:
    config = read_config(path, DistillConfig)
    assert config.student == StudentConfig(starts=(0, 4), split=10)
    assert config.training.lr == 1e-3 and config.training.betas == (0.9, 0.95)
    assert config.pairs.recipe is None and config.pairs.num == 20
    assert build(DistillConfig, as_dict(config), "") == config


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.lr=1e-3", "training.lr", 1e-3),
        ("training.lr=2", "training.lr", 2.0),
        ("training.steps=12", "training.steps", 12),
        ("training.precision=bf16", "training.precision", "bf16"),
        ("training.precision=no", "training.precision", "no"),
        ("student.starts=[0, 3, 7]", "student.starts", (0, 3, 7)),
        ("student.split=null", "student.split", None),
        ("pairs.recipe.top_k=7", "pairs.recipe", Recipe(top_k=7)),
        ("pairs.recipe={guidance_scale: 2}", "pairs.recipe", Recipe(guidance_scale=2.0)),
        ("teacher=a=b", "teacher", "a=b"),
        ("training.betas=[0.8, 0.9]", "training.betas", (0.8, 0.9)),
    ],
)
def test_overrides(path: Path, override: str, key: str, value: Any) -> None:
    found: Any = read_config(path, DistillConfig, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=5", r"unknown config key training\.step; did you mean training\.steps\?"),
        ("pair.num=5", "unknown config key pair; did you mean pairs"),
        ("training.zzz=5", "unknown config key training.zzz; it knows steps, batch"),
        ("training.steps=1.5", r"training\.steps must be int, got 1\.5"),
        ("training.steps=many", r"training\.steps must be int, got 'many'"),
        ("training.steps=true", r"training\.steps must be int, got True"),
        ("training.steps=0", r"training\.steps must be at least 1, got 0"),
        ("training.lr=fast", r"training\.lr must be float, got 'fast'"),
        ("training.lr=true", r"training\.lr must be float, got True"),
        ("training.lr=0", r"training\.lr must be above 0"),
        ("training.lr=nan", r"training\.lr must be a finite number, got nan"),
        ("training.ema_decay=1", r"training\.ema_decay must lie in \[0, 1\)"),
        ("training.precision=fp16", r"training\.precision must be one of no, bf16, got 'fp16'"),
        ("training.betas=[0.9]", r"training\.betas must be a list"),
        ("training.betas=0.9", r"training\.betas must be a list"),
        ("student.starts=5", r"student\.starts must be a list, got 5"),
        ("student.starts=[4]", r"student\.starts must begin with 0"),
        ("student.starts=[0, 9, 4]", r"student\.starts must begin with 0 and rise"),
        ("student.starts=[0, 1.5]", r"student\.starts\[1\] must be int, got 1\.5"),
        ("student.depth=0", r"student\.depth"),
        ("pairs.num=0", r"pairs\.num must be at least 1"),
        ("pairs.recipe.top_p=2", r"top_p must lie in \(0, 1\]"),
        ("pairs=5", "pairs must be a group of keys"),
        ("teacher.name=x", "teacher is no group"),
        ("teacher=5", "teacher must be str, got 5"),
        ("student.initial_share=0.5", r"initial_share is of a model's weights; student\.initial is teacher"),
        ("student.initial_share=1", r"student\.initial_share must lie in \[0, 1\)"),
        ("objective.energy_spread=0.02", r"energy_spread needs objective\.energy_memory"),
        ("objective.energy_memory=[4, 2]", r"objective\.energy_memory is of the energy distance"),
        ("objective={logits: 0}", "all weights of objective are 0"),
        ("objective.energy_spread=-1", r"objective\.energy_spread must be at least 0"),
        (
            "objective.score={guidance: tokens, tuning: {steps: 1, batch: 2, lr: 1}}",
            r"score\.tuning trains a guidance network of velocities",
        ),
        ("objective.features=[1]", r"objective\.features must be str"),
        ("training.steps", r"override 'training.steps' must read key\.path=value"),
        ("training.steps=[1", "the value is no YAML"),
        ("=5", "unknown config key"),
    ],
)
def test_mistakes_are_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(path, DistillConfig, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no YAML"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("teacher: x", "config key pairs is missing"),
        ("teacher: x\npairs: {}\nstudent: {}\nobjective: {}\ntraining: {}", r"config key pairs\.num is missing"),
    ],
)
def test_files_that_are_no_recipe_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "recipe.yaml", DistillConfig)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ValueError, match="no config file"):
            read_config(path, DistillConfig)


@dataclass(frozen=True, kw_only=True)
class Sample:
    size: float
    kind: Literal["a", "no"] = "a"
    sizes: tuple[int, ...] = ()
    extra: dict[str, Any] | None = None


def test_plain_yaml_types(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("size: 1e-3\nkind: no\nsizes: [1, 2]\nextra: {a: [1]}")
    assert read_config(tmp_path / "x.yaml", Sample) == Sample(size=1e-3, kind="no", sizes=(1, 2), extra={"a": [1]})


def test_configs_cannot_change() -> None:
    for config in (PairsConfig(num=1), StudentConfig(), ObjectiveConfig(), TrainingConfig(steps=1, batch=1, lr=1.0)):
        with pytest.raises(AttributeError):
            config.seed = 1  # type: ignore[misc]


def test_a_weight_holds_from_its_share_of_the_run_on() -> None:
    assert [weight_at({0.0: 2.0, 0.5: 3.0}, p) for p in (0.0, 0.49, 0.5, 0.99)] == [2.0, 2.0, 3.0, 3.0]
    assert weight_at({0.5: 3.0}, 0.2) == 0.0
    assert weight_at(4.0, 0.9) == 4.0


@pytest.mark.parametrize("weight", [-1.0, {0.5: -1.0}, {1.5: 1.0}])
def test_weights_out_of_range_are_refused(weight: object) -> None:
    with pytest.raises(ValueError, match=r"objective\.energy"):
        ObjectiveConfig(energy=weight)  # type: ignore[arg-type]


def test_what_is_chosen_is_what_differs_from_the_defaults(path: Path) -> None:
    plain = read_config(path, DistillConfig)
    assert "joins" not in chosen(plain)["student"] and "report_to" not in chosen(plain)["training"]
    changed = read_config(
        path, DistillConfig, ["student.initial=m", "objective.score.draws=3", "training.ema_decay=0.5"]
    )
    assert chosen(changed)["student"]["initial"] == "m" and chosen(changed)["training"]["ema_decay"] == 0.5
    assert chosen(changed)["objective"]["score"] == {"draws": 3}
    assert build(DistillConfig, chosen(changed), "") == changed
