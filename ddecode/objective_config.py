"""What a recipe says of the terms that train a student (`ddecode.objectives`)."""

from dataclasses import dataclass, field
from typing import Literal

from ddecode.arguments import check_above, check_whole
from ddecode.training_config import TrainingConfig
from ddecode.typed import settle
from ddecode.weight import Weight, check_weight


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
    """The first stage's run; None leaves it out."""
    initial: str = "teacher"
    """What the guidance network begins as: the teacher, of velocities with a fresh head; or what an earlier run has of
    it, `RUN/tuning` the end of its first stage, `RUN` that of its second."""

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
        if self.initial != "teacher" and self.tuning is not None:
            raise ValueError(
                "objective.score.tuning trains a guidance network from the teacher on: leave it out, or "
                "objective.score.initial"
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
    must be off."""
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
