"""Typed configuration: frozen dataclasses read from YAML, unknown or misshapen keys refused."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ddecode.arguments import LARGEST_SEED, check_above, check_finite, check_kind, check_whole, shown
from ddecode.teacher import Recipe
from ddecode.typed import build, settle
from ddecode.weight import Weight, check_weight
from ddecode.yaml_text import as_text, parse_yaml, read_yaml

T = TypeVar("T")
ReporterName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run, of a teacher or a student."""

    steps: int
    batch: int
    """Samples of one optimiser step, over all processes."""
    lr: float
    warmup_steps: int = 100
    final_lr: float = 0.0
    """Where the cosine of the learning rate ends."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    """Upper bound; the decay at step i is min(ema_decay, (1 + i) / (10 + i))."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 is autocast; weights, EMA and optimiser stay fp32."""
    compile: bool = False
    """Compile the model's blocks: half again as fast on a CPU, where it needs a C++ compiler."""
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    preview_every: int = 0
    """Steps between sample grids; 0 is none."""
    report_to: tuple[ReporterName, ...] = ()
    """Who shows the run beside its `log.jsonl` (`ddecode.reporters`); it may change when the run goes on."""

    def __post_init__(self) -> None:
        settle(self, "training")
        for name in ("steps", "batch", "log_every", "save_every"):
            check_whole(f"training.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "preview_every"):
            check_whole(f"training.{name}", getattr(self, name), 0)
        check_whole("training.seed", self.seed, 0, LARGEST_SEED)
        for name in ("lr", "clip_norm"):
            check_above("training." + name, getattr(self, name))
        for name in ("final_lr", "weight_decay"):
            check_weight(f"training.{name}", getattr(self, name))
        for name, value in (("ema_decay", self.ema_decay), *(("betas", beta) for beta in self.betas)):
            if not 0 <= value < 1:
                raise ValueError(f"training.{name} must lie in [0, 1), got {value}")
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError(f"training.report_to names one twice: {', '.join(self.report_to)}")


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
    read. It suits teachers of few steps, such as VAR."""
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
    initial: str = "teacher"
    """Where its weights come from: `teacher`, `random`, `tuning` (the end of `objective.score.tuning`, for DD2's
    student), or a model whose student it goes on from."""
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
        if self.initial == "tuning" and (self.diffusion_head is None or self.depth is not None):
            raise ValueError("student.initial: tuning is for a student with diffusion_head and all layers")


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The adversarial term (`ddecode.objectives.adversarial`)."""

    weight: Weight = 0.0
    lr: float = 1e-3
    """Of the discriminator, constant after the warm-up; it begins with the term, untrained."""
    width: int = 64
    """Of its heads."""
    images: str | None = None
    """A folder with one sub-folder of images for each class, which are told from the student's (see
    `ddecode.objectives.positives`); None: the teacher's samples are, so that no data are needed."""

    def __post_init__(self) -> None:
        settle(self, "objective.adversarial")
        check_weight("objective.adversarial.weight", self.weight)
        check_above("objective.adversarial.lr", self.lr)
        check_whole("objective.adversarial.width", self.width, 1)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """The score term, DD2's second stage (`ddecode.objectives.score`), and the first, which prepares its guidance."""

    weight: Weight = 0.0
    """Until it is above 0 the guidance network already learns from the student, which it does not yet move."""
    form: Literal["dmd", "sid"] = "dmd"
    guidance: Literal["velocities", "tokens"] = "velocities"
    """What the guidance network learns of the student. `velocities` of its noisy vectors, DD2's way, which need
    `tuning`: what is wrong with them moves the student. Or the probabilities of its `tokens`, by cross-entropy, from
    which the scores follow exactly, for students that emit tokens at all positions."""
    draws: int = 1
    """Noise draws of each sequence for the student."""
    guidance_draws: int = 4
    """The same for the guidance network."""
    updates: int = 1
    """Steps of the guidance network for each step of the student; `training.steps` counts them all."""
    lr: float = 2e-4
    """Of the guidance network, constant after the warm-up."""
    align_every: int = 0
    """Every so many steps the student goes back to its EMA (performance alignment); 0 is never."""
    align_steps: int = 20
    """Steps after that in which the guidance network alone is trained."""
    target: Literal["analytic", "monte_carlo"] = "analytic"
    """What the first stage regresses."""
    tuning: TrainingConfig | None = None
    """The first stage's run; None leaves it out: the guidance network starts as the teacher with a fresh head."""

    def __post_init__(self) -> None:
        settle(self, "objective.score")
        check_weight("objective.score.weight", self.weight)
        for name in ("draws", "guidance_draws", "updates"):
            check_whole(f"objective.score.{name}", getattr(self, name), 1)
        for name in ("align_every", "align_steps"):
            check_whole(f"objective.score.{name}", getattr(self, name), 0)
        check_above("objective.score.lr", self.lr)
        if self.guidance == "tokens" and self.tuning is not None:
            raise ValueError(
                "objective.score.tuning trains a guidance network of velocities: leave it out, or set "
                "objective.score.guidance to velocities"
            )
        if self.align_every and not self.align_steps < self.align_every:
            raise ValueError(f"objective.score.align_steps must lie in 0..{self.align_every - 1}")

    def realigns(self, step: int) -> bool:
        """Whether the student goes back to its EMA before this step."""
        return bool(self.align_every and step and step % self.align_every == 0)

    def students_turn(self, step: int) -> bool:
        """Whether the student learns in this step, or the guidance network alone."""
        if self.align_every and step >= self.align_every and step % self.align_every < self.align_steps:
            return False
        return step % self.updates == self.updates - 1


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """The token-matching term (`ddecode.objectives.matching`)."""

    weight: Weight = 0.0
    """Until it is above 0 the guidance network already learns from the student, which it does not yet move. It needs a
    little of that. Only sequences that are the student's from the first token on count: where it has a second start,
    give `objective.own_prefix`, or only its first pass is trained."""
    lr: float = 5e-4
    """Of the guidance network, constant after the warm-up."""
    temperature: float = 1.0
    """Of the student's weights over codes: 1 for a student that drafts, lower for one that takes the argmax."""
    clip: float = 3.0
    """Bound on the log-ratio of the guidance network's probabilities to the teacher's."""
    initial: str = "teacher"
    """What the guidance network begins as: the teacher, or the folder of an earlier run whose own goes on."""

    def __post_init__(self) -> None:
        settle(self, "objective.matching")
        check_weight("objective.matching.weight", self.weight)
        for name in ("lr", "temperature", "clip"):
            check_above(f"objective.matching.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The terms that train a student; a weight of 0 leaves a term out."""

    logits: Weight = 1.0
    """Cross-entropy of the logits."""
    targets: Literal["tokens", "probabilities"] = "tokens"
    """What it is against: the pairs' tokens, or all that the teacher knew there, which only a student with `drafts`,
    `exits` or `wavefront` can be asked for."""
    teacher_forcing: bool = False
    """For a student with `exits` or `wavefront`: the pairs' tokens are fed in where it would settle its own. What it
    predicts is then never wrong for an earlier token's sake; but what it emits is not seen, so terms that look at that
    must be off. A wavefront also learns the first passes of sampling in more steps, which end at its later starts."""
    fresh_noise: bool = False
    """Give the pairs' tokens other noise at each step, by the inverse map, so that finitely many pairs never repeat."""
    cache_gib: float = 0.0
    """Memory for the teacher's probabilities, which `targets: probabilities` and `fresh_noise` need; what does not fit
    is computed anew each time."""
    drafts: Weight = 0.3
    """The same of each draft between a student's layers, where it makes any."""
    embeddings: Weight = 0.0
    """Squared error of the continuous head against the tokens' codes; it pulls towards the mean, so it is a warm-up."""
    perceptual: Weight = 0.0
    """Perceptual distance of the decoded output to the decoded tokens."""
    energy: Weight = 0.0
    """Energy distance between the features of a batch of outputs and of the teacher's."""
    energy_memory: tuple[int, int] = (0, 0)
    """Earlier batches (of `image_batch` samples) of the teacher's features, and of the student's, that the energy
    distance sets a batch against as well, for less noise. The student's grow stale: a few."""
    energy_spread: float = 0.0
    """By how much a step raises or lowers the push among the student's samples, until their mean distance within a
    class is the teacher's in each kind of pass, against terms that narrow it; 0 is off. It needs `energy_memory`. 0.01
    to 0.02 is enough for a few hundred steps."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    own_prefix: Weight = 0.0
    """Share of the image, score and matching terms' samples that, where they start from resolved tokens, start from the
    student's own first pass instead of the teacher's tokens, as sampling in two steps does."""
    features: str = "fashion-perceptual"
    """Feature network of the image terms: a bundled one's name, or a folder."""
    image_batch: int = 64
    """Samples of a batch whose output the image, score and matching terms see; all where it has fewer."""

    def __post_init__(self) -> None:
        settle(self, "objective")
        for name in ("logits", "drafts", "embeddings", "perceptual", "energy", "own_prefix"):
            check_weight(f"objective.{name}", getattr(self, name))
        if max(self.own_prefix.values() if isinstance(self.own_prefix, dict) else [self.own_prefix]) > 1:
            raise ValueError(f"objective.own_prefix must be a share of at most 1, got {self.own_prefix}")
        check_weight("objective.cache_gib", self.cache_gib)
        check_whole("objective.image_batch", self.image_batch, 2)
        if len(self.energy_memory) != 2:
            raise ValueError(f"objective.energy_memory must be two numbers, got {list(self.energy_memory)}")
        for batches in self.energy_memory:
            check_whole("objective.energy_memory", batches, 0)
        check_weight("objective.energy_spread", self.energy_spread)
        if self.teacher_forcing and (self.uses_images or self.score.weight or self.matching.weight):
            raise ValueError(
                "objective.teacher_forcing leaves nothing emitted to look at: set the image, score and matching terms "
                "to 0, or train with them in a stage of its own"
            )
        if any(self.energy_memory) and not self.energy:
            raise ValueError("objective.energy_memory is of the energy distance: give objective.energy a weight")
        if self.energy_spread and not any(self.energy_memory):
            raise ValueError("objective.energy_spread needs objective.energy_memory, such as [64, 6]")

    @property
    def uses_teacher_probabilities(self) -> bool:
        """Whether pairs must come with all that the teacher knew."""
        return self.fresh_noise or self.targets == "probabilities"

    @property
    def trains(self) -> bool:
        """Whether there is a term that trains the student."""
        return bool(self.logits or self.embeddings or self.uses_images or self.score.weight or self.matching.weight)

    @property
    def uses_images(self) -> bool:
        """Whether an image term is on at any time."""
        return bool(self.perceptual or self.energy or self.adversarial.weight)


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
        if self.student.initial == "tuning" and not (self.objective.score.weight and self.objective.score.tuning):
            raise ValueError("student.initial: tuning needs objective.score with a weight and tuning, which trains it")


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


def decisive(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Configs as plain data, at any depth without what changes nothing about a training: a recipe's notes, what it says
    of an own teacher, which is known by its weights, and every `report_to`."""
    kept = {key: value for key, value in tree.items() if key not in ("expected", "own_teacher", "report_to")}
    return {key: decisive(value) if isinstance(value, dict) else value for key, value in kept.items()}


def as_yaml(config: Any) -> str:
    """A config as `read_config` reads it, with all that it left to defaults."""
    return as_text(as_dict(config))
