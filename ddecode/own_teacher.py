"""A teacher of one's own images: feature networks, tokenizer and AR transformer, trained one after the other.

The folder of a run holds `images/` (the images at their final size), `features/judge/` and `features/perceptual/` (two
networks that share no weights, so that nothing is trained on the features that judge it), `tokenizer/`, `teacher/`,
and in the end `model/`: tokenizer and teacher in our directory format. Each of the four trainings is a run of
`ddecode.training`, with its own log and checkpoint.

N images, B batch, L token positions, K classes, H W image height and width.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from ddecode.arguments import as_path, check_kind
from ddecode.checkpoint import family_module, save_model
from ddecode.config import as_dict, build, chosen
from ddecode.evaluation.features import FeatureNetwork, load_features, save_features
from ddecode.evaluation.zoo import write_statistics
from ddecode.files import write_aside
from ddecode.images import grid, png, to_uint8
from ddecode.locks import held
from ddecode.objectives.likelihood import LikelihoodObjective
from ddecode.objectives.recognition import ClassObjective, InstanceObjective
from ddecode.objectives.reconstruction import CountedTokenizer, ReconstructionObjective
from ddecode.own_images import AT_ONCE, ImageSamples, ImagesConfig, OwnImages, TokenSamples, spread
from ddecode.processes import launch
from ddecode.randomness import derived_seed, fresh_weights
from ddecode.reporters import check_reporters
from ddecode.run_folder import check_new
from ddecode.teacher import Recipe, Teacher
from ddecode.training import Objective, Preview, Samples, Shown, train
from ddecode.training_config import TrainingConfig

STAGES = ("features/judge", "features/perceptual", "tokenizer", "teacher")
PROJECTION = 64
"""Width of what a feature network compares where there are no classes."""
PICTURED, COLUMNS = 32, 16
KEPT = 512
"""Held-out images that losses are measured on at most."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The two feature networks."""

    training: TrainingConfig
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"own_teacher.features.widths must be numbers of at least 1, got {list(self.widths)}")
        if self.blocks < 1:
            raise ValueError(f"own_teacher.features.blocks must be at least 1, got {self.blocks}")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """The tokenizer."""

    sizes: dict[str, Any]
    """The family's own."""
    training: TrainingConfig
    perceptual: float = 0.03
    """Weight of the perceptual error beside the squared one."""

    def __post_init__(self) -> None:
        if not 0 <= self.perceptual < math.inf:
            raise ValueError(f"own_teacher.tokenizer.perceptual must be at least 0, got {self.perceptual}")


@dataclass(frozen=True, kw_only=True)
class OwnTeacherConfig:
    """A teacher and all that it stands on."""

    family: str
    features: FeaturesConfig
    tokenizer: TokenizerTrainingConfig
    backbone: dict[str, Any]
    """The family's sizes, without those that follow from images and tokenizer."""
    training: TrainingConfig
    """Of the transformer."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    label_drop: float = 0.1
    """Share of labels left out, for guidance."""
    recipe: Recipe = field(default_factory=Recipe)
    """How the teacher is sampled; without classes there is nothing to guide to, and guidance is off."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"own_teacher.label_drop must lie in [0, 1), got {self.label_drop}")
        least = 2 ** len(self.features.widths)
        if self.images.side < least:
            raise ValueError(
                f"images of {self.images.side} pixels are too small for feature networks that need {least}"
            )


def model_sizes(config: OwnTeacherConfig, num_classes: int) -> tuple[Any, Any]:
    """The family's sizes of tokenizer and transformer.

    Raises:
        ValueError: they are unknown, or do not fit the images or each other.
    """
    family = family_module(config.family)
    tokenizer = build(family.TokenizerConfig, config.tokenizer.sizes, "own_teacher.tokenizer.sizes")
    derived = family.shared_sizes(tokenizer, config.images.side) | {"num_classes": num_classes}
    if given := sorted(set(derived) & set(config.backbone)):
        raise ValueError(f"own_teacher.backbone: leave {', '.join(given)} out; images and tokenizer tell")
    return tokenizer, build(family.BackboneConfig, config.backbone | derived, "own_teacher.backbone")


def check_models(config: OwnTeacherConfig) -> None:
    """`model_sizes` for any number of classes, and that such models can be built.

    Raises:
        ValueError: they cannot.
    """
    tokenizer_sizes, sizes = model_sizes(config, 1)
    family = family_module(config.family)
    try:
        with torch.device("meta"):
            family.build_backbone(sizes, family.build_tokenizer(tokenizer_sizes, None), None)
    except (RuntimeError, ZeroDivisionError, TypeError) as error:
        raise ValueError(f"no models of these sizes can be built: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True, kw_only=True)
class OwnTeacherRun:
    """The trainings, which hand their results on."""

    config: OwnTeacherConfig
    images: OwnImages
    out: Path
    resume: bool
    show_progress: bool

    def train(
        self,
        stage: str,
        objective: Objective,
        samples: Samples,
        training: TrainingConfig,
        preview: Preview | None = None,
        **facts: Any,
    ) -> nn.Module:
        """One training, in the run's folder of its name; `facts` are the configs it follows from."""
        if self.show_progress:
            print(f"{self.out / stage}: {training.steps} steps of {training.batch}", flush=True)
        identity = {"images": self.images.hash, "reading": chosen(self.config.images), "training": chosen(training)}
        return train(
            objective, samples, training, self.out / stage,
            identity=identity | facts, resume=self.resume, preview=preview, show_progress=self.show_progress,
        )  # fmt: skip

    def features(self, name: str, stream: int) -> FeatureNetwork:
        """Train one of the feature networks, or read it, and save it."""
        config, images = self.config.features, self.images
        training = dataclasses.replace(config.training, seed=derived_seed(config.training.seed, stream) % 2**31)
        labelled = images.num_classes > 1
        with fresh_weights(training.seed):
            network = FeatureNetwork(
                widths=config.widths, blocks=config.blocks, num_classes=images.num_classes if labelled else PROJECTION
            )
        objective = (ClassObjective if labelled else InstanceObjective)(network, mirror=self.config.images.mirror)
        folder = self.out / "features" / name
        average = self.train(f"features/{name}", objective, images.training, training, features=chosen(config))
        assert isinstance(average, FeatureNetwork)
        settle(average, images.training)
        facts: dict[str, object] = {"told_apart": "classes" if labelled else "images"}
        if labelled and len(images.held_out):
            facts["held_out_accuracy"] = round(accuracy(average, images.held_out), 4)
        save_features(folder, average, **facts)
        return load_features(folder)

    def tokenizer(self, features: FeatureNetwork) -> Any:
        """Train the tokenizer, or read it."""
        config = self.config.tokenizer
        sizes, _ = model_sizes(self.config, self.images.num_classes)
        with fresh_weights(config.training.seed):
            tokenizer = family_module(self.config.family).build_tokenizer(sizes, None).requires_grad_(True)
            objective = ReconstructionObjective(
                tokenizer, features, perceptual=config.perceptual, mirror=self.config.images.mirror
            )
        facts = {"features": chosen(self.config.features), "tokenizer": chosen(config)}
        preview = self.pictures("tokenizer", lambda average: rebuilt(average, self.images))
        average = self.train("tokenizer", objective, self.images.training, config.training, preview, **facts)
        assert isinstance(average, CountedTokenizer)
        return average.tokenizer

    def teacher(self, tokenizer: Any) -> Teacher:
        """Train the transformer, or read it."""
        config, images = self.config, self.images
        _, sizes = model_sizes(config, images.num_classes)
        labelled = images.num_classes > 1
        recipe = config.recipe if labelled else dataclasses.replace(config.recipe, guidance_scale=0.0)
        with fresh_weights(config.training.seed):
            teacher = family_module(config.family).build_teacher(sizes, tokenizer, None, recipe)
        teacher.backbone.requires_grad_(True)
        objective = LikelihoodObjective(teacher, label_drop=config.label_drop if labelled else 0.0)
        mirror, show = config.images.mirror, self.show_progress
        samples = TokenSamples(tokenizer, images.training, mirror=mirror, show_progress=show)
        kept_out = TokenSamples(tokenizer, images.held_out, mirror=False, show_progress=False)

        def preview(average: nn.Module) -> tuple[np.ndarray, dict[str, float]]:
            return sampled(Teacher(average, tokenizer, family=config.family, recipe=recipe), kept_out)  # type: ignore[arg-type]

        pictures = self.pictures("teacher", preview)
        average = self.train("teacher", objective, samples, config.training, pictures, teacher=chosen(config))
        return Teacher(average, tokenizer, family=config.family, recipe=recipe)  # type: ignore[arg-type]

    def pictures(self, stage: str, show: Callable[[Any], tuple[np.ndarray, Mapping[str, float]]]) -> Preview:
        """A `ddecode.training.Preview` that writes what `show` makes of the average to `STAGE/previews`."""

        @torch.no_grad()
        def preview(average: nn.Module, step: int) -> Shown:
            images_NHW3, metrics = show(average)
            folder = self.out / stage / "previews"
            folder.mkdir(parents=True, exist_ok=True)
            picture = grid(images_NHW3, COLUMNS, scale=max(1, 96 // images_NHW3.shape[1]))
            write_aside(folder / f"{step:07d}.png", png(picture))
            return Shown(metrics=metrics, pictures={"preview": picture})

        return preview


def settle(network: FeatureNetwork, samples: ImageSamples) -> None:
    """Set the running moments of an average's batch norms, which belong to no weights that could be averaged."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[: 32 * AT_ONCE]
    parts, device = order.tensor_split(-(-len(order) // AT_ONCE)), next(network.parameters()).device
    update_bn((samples.batch(part.tolist())[0].to(device) for part in parts), network)


@torch.no_grad()
def accuracy(network: FeatureNetwork, samples: ImageSamples) -> float:
    right, device = 0, next(network.parameters()).device
    for part in torch.arange(len(samples)).split(AT_ONCE):
        x, labels_B = samples.batch(part.tolist())
        right += int((network(x.to(device)).logits_BK.argmax(1).cpu() == labels_B).sum())
    return right / len(samples)


def rebuilt(average: Any, images: OwnImages) -> tuple[np.ndarray, dict[str, float]]:
    """Rows of images over their reconstructions and, where some are held out, the squared error of these on [-1,1]."""
    tokenizer, samples = average.tokenizer, images.held_out if len(images.held_out) else images.training
    x = samples.some(KEPT)[0].to(tokenizer.codebook_VC.device)
    y = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in x.split(AT_ONCE)])
    shown = samples.some(PICTURED)[0].to(x.device)
    pairs = zip(shown.split(COLUMNS), tokenizer.decode(tokenizer.encode(shown)).split(COLUMNS), strict=True)
    rows = [to_uint8(row) for pair in pairs for row in pair]
    return np.concatenate(rows), {"heldout_square": F.mse_loss(y, x).item()} if len(images.held_out) else {}


def sampled(teacher: Teacher, kept_out: TokenSamples) -> tuple[np.ndarray, dict[str, float]]:
    """Samples of the classes in turn, and the cross-entropy of held-out images where there are any."""
    labels = [i % teacher.num_classes for i in range(PICTURED)]
    generator = torch.Generator().manual_seed(0)
    ids_BL = teacher.generate(labels, **dataclasses.asdict(teacher.recipe), generator=generator)
    losses = []
    kept = spread(len(kept_out), KEPT)
    for part in (kept[i : i + AT_ONCE] for i in range(0, len(kept), AT_ONCE)):
        ids, labels_B = (tensor.to(teacher.device) for tensor in kept_out.batch(part))
        losses.append(F.cross_entropy(teacher.forward(ids, labels_B).flatten(0, 1), ids.flatten(), reduction="none"))
    metrics = {"heldout": torch.cat(losses).mean().item()} if losses else {}
    return to_uint8(teacher.tokenizer.decode(ids_BL)), metrics


def train_teacher(
    config: OwnTeacherConfig, folder: str | Path, out: str | Path, *, resume: bool = False, show_progress: bool = True
) -> Path:
    """Train all of a teacher on a folder of images and write the model folder.

    Args:
        config: the recipe's group `own_teacher`.
        folder: the images, see `ddecode.labelled_images`.
        out: the run's folder.
        resume: go on from what is there: stages that are done are only read.

    Returns:
        The model folder, `out/model`.

    Raises:
        ValueError: images that are not there or damaged, sizes that do not fit them, a run that is there already, is at
            work there or is of another config; a library of `report_to` that is missing; more than one process.
        OSError: the disk is full, say.
    """
    check_kind("config", config, OwnTeacherConfig)
    folder, out = as_path("a folder of images", folder), as_path("a run's folder", out)
    if launch().num_processes > 1:
        raise ValueError("a teacher of one's own images is trained by one process")
    check_models(config)  # before anything is read
    for stage in (config.features.training, config.tokenizer.training, config.training):
        check_reporters(stage.report_to)
    check_new(out, STAGES, resume=resume)
    with held(out):
        images = OwnImages.read(folder, config.images, out / "images", show_progress=show_progress)
        run = OwnTeacherRun(config=config, images=images, out=out, resume=resume, show_progress=show_progress)
        run.features("judge", 0)
        write_statistics(out / "features" / "judge", images.whole.images_N3HW.permute(0, 2, 3, 1).numpy())
        tokenizer = run.tokenizer(run.features("perceptual", 1))
        teacher = run.teacher(tokenizer)
        backbone: Any = teacher.backbone
        description = {
            "family": config.family,
            "tokenizer": as_dict(tokenizer.config),
            "teacher": {"backbone": as_dict(backbone.config), "recipe": as_dict(teacher.recipe)},
            "class_names": images.class_names,
            "features": str(out / "features" / "judge"),
        }
        save_model(out / "model", description, {"tokenizer": tokenizer, "teacher": backbone})
    return out / "model"
