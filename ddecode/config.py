"""Typed configuration: frozen dataclasses read from YAML, unknown or misshapen keys refused."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ddecode.arguments import LARGEST_SEED, check_finite, check_kind, check_whole, shown
from ddecode.objective_config import ObjectiveConfig
from ddecode.teacher import Recipe
from ddecode.training_config import TrainingConfig
from ddecode.typed import build, settle
from ddecode.yaml_text import as_text, parse_yaml, read_yaml

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Noise-token pairs made by walking the teacher."""

    num: int
    recipe: Recipe | None = None
    """None takes the teacher's own."""
    num_steps: int = 16
    """Evaluations of the noise-to-token map at each position."""
    seed: int = 0
    batch: int = 256
    shard_size: int = 4096
    precision: Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        settle(self, "pairs")
        for name in ("num", "num_steps", "batch", "shard_size"):
            check_whole(f"pairs.{name}", getattr(self, name), 1)
        check_whole("pairs.seed", self.seed, 0, LARGEST_SEED)


WITHOUT_MODEL = ("teacher", "random", "tuning")
"""Values of `student.initial` that name no model."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """A student around its teacher's backbone."""

    starts: tuple[int, ...] = (0,)
    """Numbers of resolved tokens that it is trained to continue from; the first is 0."""
    split: int | None = None
    """Positions before it are emitted as argmax tokens, the rest as continuous vectors; None: all are tokens."""
    depth: int | None = None
    """Layers kept of the teacher, evenly spaced; None keeps all."""
    drafts: tuple[int, ...] | None = None
    """None: DD1's student. Otherwise one that predicts probabilities and leaves the tokens to the map
    (`ddecode.draft_student`), drafting them after these numbers of layers; it has no `split`."""
    exits: tuple[int, ...] | None = None
    """None, or a student that predicts probabilities as one that drafts does, through whose depth the AR steps go one
    behind the other (`ddecode.staggered_student`): for each AR step, the number of layers after which its tokens are
    read, two of them after the same where layers are few. It suits teachers of few steps, such as VAR."""
    wavefront: int | None = None
    """None, or the like for teachers of many steps of one token, such as LlamaGen (`ddecode.wavefront_student`): tokens
    go through its depth diagonal by diagonal, column + this many times the row. 2 lets each see its three nearest
    neighbours before it; 1 is faster."""
    joins: int = 0
    """Layers that the positions of the last AR step leave out, 0 or one of `drafts` or `exits`: cheaper, at some
    cost."""
    draft_steps: int = 8
    """Evaluations of the map within the network: at a draft, whose tokens are made again at the end with those of the
    pairs, and wherever tokens are settled within."""
    diffusion_head: int | None = None
    """None, or DD2's student (`ddecode.dd2_student`): blocks of the head that goes from noise to a vector. It has
    neither `split` nor `drafts`, and no logits."""
    noise_level: float = 1.0
    """Where on that head's way it stands, in (0, 1]: 1 is DD2's; lower, it looks at its noise from the beginning."""
    initial: str = "teacher"
    """Where its weights come from: `teacher`, `random`, `tuning` (as the score term's guidance network begins, for
    DD2's student), or a model whose student it goes on from."""
    initial_share: float = 0.0
    """Share of that model's weights in the one that is written, the rest is what training made of them: on the line
    between both lie better ones than at its ends where training overshoots (Wortsman et al., arXiv 2109.01903)."""

    @property
    def mapped(self) -> bool:
        """Whether it predicts probabilities and leaves the tokens to the map."""
        return any(kind is not None for kind in (self.drafts, self.exits, self.wavefront))

    def __post_init__(self) -> None:
        settle(self, "student")
        if not self.starts or self.starts[0] != 0 or list(self.starts) != sorted(set(self.starts)):
            raise ValueError(f"student.starts must begin with 0 and rise, got {list(self.starts)}")
        for name, lowest in (("depth", 1), ("split", 0), ("wavefront", 1), ("diffusion_head", 1), ("draft_steps", 1)):
            if getattr(self, name) is not None:
                check_whole(f"student.{name}", getattr(self, name), lowest)
        kinds = (self.split, self.drafts, self.exits, self.wavefront, self.diffusion_head)
        if sum(kind is not None for kind in kinds) > 1:
            raise ValueError(
                "student.split, student.drafts, student.exits, student.wavefront and student.diffusion_head are five "
                "kinds: give one"
            )
        if self.joins not in (0, *(self.drafts or ()), *(self.exits or ())[:-1]):
            raise ValueError(f"student.joins must be 0 or one of student.drafts or student.exits, got {self.joins}")
        check_finite("student.initial_share", self.initial_share)
        if not 0 <= self.initial_share < 1:
            raise ValueError(f"student.initial_share must lie in [0, 1), got {self.initial_share}")
        if self.initial_share and self.initial in WITHOUT_MODEL:
            raise ValueError(f"student.initial_share is of a model's weights; student.initial is {self.initial}")
        check_finite("student.noise_level", self.noise_level)
        if not 0 < self.noise_level <= 1:
            raise ValueError(f"student.noise_level must lie in (0, 1], got {self.noise_level}")
        if self.noise_level < 1 and self.diffusion_head is None:
            raise ValueError("student.noise_level is of a student with student.diffusion_head")
        if self.initial == "tuning" and (self.diffusion_head is None or self.depth is not None):
            raise ValueError("student.initial: tuning is for a student with diffusion_head and all layers")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher's distillation, from pairs to student."""

    teacher: str
    pairs: PairsConfig
    student: StudentConfig
    objective: ObjectiveConfig
    training: TrainingConfig
    own_teacher: dict[str, Any] = field(default_factory=dict)
    """How `ddecode train` makes the teacher of images (`ddecode.own_teacher`); nothing to the other verbs."""
    expected: dict[str, Any] = field(default_factory=dict)
    """Measured metrics with protocol, hardware and date, or the words `not yet measured`; for people."""

    def __post_init__(self) -> None:
        settle(self, "")
        if not self.objective.trains:
            raise ValueError("all weights of objective are 0: there is nothing to train the student by")
        if self.objective.targets == "probabilities" and not self.student.mapped:
            raise ValueError(
                "objective.targets: probabilities is for a student with student.drafts, student.exits or "
                "student.wavefront; another's token follows from its noise"
            )
        if self.objective.teacher_forcing and self.student.exits is None and self.student.wavefront is None:
            raise ValueError("objective.teacher_forcing is for a student with student.exits or student.wavefront")
        if self.objective.teacher_forcing and self.objective.fresh_noise and self.student.exits is not None:
            raise ValueError(
                "with objective.teacher_forcing a student with student.exits reads no noise: leave "
                "objective.fresh_noise out"
            )
        if self.objective.own_prefix and len(self.student.starts) == 1:
            raise ValueError(
                "objective.own_prefix is what a pass from a second start begins with: student.starts has one"
            )
        if self.student.diffusion_head is not None and self.objective.logits:
            raise ValueError(
                "a student with student.diffusion_head has no logits: set objective.logits to 0; objective.embeddings "
                "regresses its vectors"
            )
        if self.student.diffusion_head is not None and self.objective.matching.weight:
            raise ValueError("objective.matching is for students with logits, not for student.diffusion_head")
        if self.student.diffusion_head is not None and self.objective.score.guidance == "tokens":
            raise ValueError(
                "a student with student.diffusion_head emits vectors: set objective.score.guidance to velocities"
            )
        score = self.objective.score
        if self.student.initial == "tuning" and not (score.weight and (score.tuning or score.initial != "teacher")):
            raise ValueError(
                "student.initial: tuning needs objective.score with a weight and tuning, which trains it, or initial"
            )


def read_config(path: Path, config_type: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into a config dataclass.

    Args:
        path: the file.
        overrides: `key.path=value`, the value in YAML.

    Raises:
        ValueError: the file is missing or no mapping, a key is unknown, missing or of the wrong type.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    for override in overrides:
        check_kind("an override", override, str)
        key, found, text = override.partition("=")
        if not found:
            raise ValueError(f"override {override!r} must read key.path=value")
        set_key(tree, key.split("."), parse_yaml(text, f"override {shown(override)}: the value"))
    return build(config_type, tree, "")


def set_key(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override of {'.'.join(keys)}: {key} is no group")
    tree[keys[-1]] = value


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain data for JSON."""
    return dataclasses.asdict(config)


def chosen(config: Any) -> dict[str, Any]:
    """The same without what is at its default, so that it does not change where later versions know more keys."""
    tree: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value, made = getattr(config, entry.name), entry.default_factory
        if value != (entry.default if made is dataclasses.MISSING else made()):
            tree[entry.name] = chosen(value) if dataclasses.is_dataclass(value) else value
    return tree


def decisive(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Configs as plain data, at any depth without what changes nothing about a training: a recipe's notes, what it says
    of an own teacher, which is known by its weights, and every `report_to`."""
    kept = {key: value for key, value in tree.items() if key not in ("expected", "own_teacher", "report_to")}
    return {key: decisive(value) if isinstance(value, dict) else value for key, value in kept.items()}


def as_yaml(config: Any) -> str:
    """A config as `read_config` reads it, with all that it left to defaults."""
    return as_text(as_dict(config))
