"""Sets of images: what they are sampled with, their labels, folders of them.

Image i of a set depends on the set's seed, on i and on its label alone. A folder's PNGs each carry the settings they
were made with, and appear under their names only when whole. A batch of which one is missing is sampled again as it
was, so that stopping and going on gives the same images.

N images of a set, B of a batch, H W image height and width.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from ddecode.arguments import LARGEST_SEED, as_path, check_choice, check_kind, check_whole, shown
from ddecode.config import as_dict
from ddecode.files import write_aside
from ddecode.images import NAME, ROUNDING, check_png, image_name, png, pngs, read_note, to_uint8
from ddecode.locks import held
from ddecode.pipeline import DistilledPipeline
from ddecode.plan import Plan
from ddecode.processes import in_turn, meet, rank, share
from ddecode.randomness import derived_seed, sample_generators
from ddecode.student import Student
from ddecode.teacher import Teacher

Labelling = Literal["balanced", "uniform"]
LABELLINGS: tuple[Labelling, ...] = get_args(Labelling)
LABEL_STREAM = 1_000_000_007
"""Sets the seed of uniform labels apart from those of samples, which are derived from the set's seed and i."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a set of images is sampled with. `num` may grow, the model may be renamed; all else is its identity."""

    model: str
    model_hash: str
    """Of the models that take part, see `weights_hash`."""
    plan: str
    recipe: dict[str, Any]
    """Guidance and filtering of teacher spans."""
    labelling: Labelling
    """See `draw_labels`."""
    classes: tuple[int, ...]
    seed: int
    num: int
    rounding: str = ROUNDING

    def labels(self) -> np.ndarray:
        return draw_labels(self.classes, self.num, labelling=self.labelling, seed=self.seed)

    def note(self) -> dict[str, Any]:
        """What each image of the set carries, as it reads from JSON: all but `num`."""
        return {key: value for key, value in json.loads(json.dumps(as_dict(self))).items() if key != "num"}


def draw_labels(classes: Sequence[int], num: int, *, labelling: Labelling = "balanced", seed: int = 0) -> np.ndarray:
    """The labels of a set, int64 [N]; those of a larger `num` begin with the same ones.

    Args:
        classes: to choose from.
        labelling: `balanced` gives image i the i-th class, round and round; `uniform` draws each independently.
        seed: the set's.

    Raises:
        ValueError: there is no class or no image, or an argument is of another kind.
    """
    check_set(classes, num, labelling, seed)
    if labelling == "balanced":
        return np.resize(np.array(classes), num)
    rng = np.random.default_rng(derived_seed(seed, LABEL_STREAM))
    return np.array(classes)[rng.integers(len(classes), size=num)]


def check_set(classes: Sequence[int], num: int, labelling: str, seed: int) -> None:
    """
    Raises:
        ValueError: one of them is no argument of `draw_labels`.
    """
    if isinstance(classes, str) or not isinstance(classes, Sequence | np.ndarray) or not len(classes):
        raise ValueError(f"classes must be a list of whole numbers, got {shown(classes)}")
    for label in classes:
        check_whole("a class", label, 0)
    check_whole("num", num, 1)
    check_choice("labelling", labelling, LABELLINGS)
    check_whole("seed", seed, 0, LARGEST_SEED)


def make_settings(
    pipe: DistilledPipeline,
    plan: Plan,
    *,
    model: str,
    classes: Sequence[int],
    num: int,
    labelling: Labelling = "balanced",
    seed: int = 0,
) -> Settings:
    """Settings of a set of images by `plan`; `model` is the pipe's name, for people.

    Raises:
        ValueError: one of the arguments is of another kind, or see `draw_labels`.
    """
    check_kind("pipe", pipe, DistilledPipeline)
    check_kind("a plan", plan, Plan)
    check_kind("model", model, str)
    check_set(classes, num, labelling, seed)
    return Settings(
        model=model,
        model_hash=weights_hash(pipe, plan),
        plan=str(plan),
        recipe=as_dict(pipe.recipe),
        labelling=labelling,
        classes=tuple(classes),
        seed=seed,
        num=num,
    )


def weights_hash(pipe: DistilledPipeline, plan: Plan) -> str:
    """SHA-256 over weights and sizes that the images of a plan depend on, 16 hex digits."""
    digest = hashlib.sha256()
    parts: dict[str, Any] = {"tokenizer": pipe.tokenizer} | {span.who: pipe.models[span.who] for span in plan.spans}
    for who, part in sorted(parts.items()):
        module = part.backbone if isinstance(part, Teacher) else part
        digest.update(json.dumps([who, sizes_of(module)], default=str).encode())
        state = module.state_dict() if isinstance(module, nn.Module) else {}
        for name, tensor in sorted(state.items()):
            digest.update(f"{who}.{name}".encode())
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())  # numpy knows no bf16
    return digest.hexdigest()[:16]


def sizes_of(module: Any) -> list[Any]:
    """What equal weights may yet differ in: heads, say, or the map's evaluations."""
    backbone = module.backbone if isinstance(module, Student) else module
    config = getattr(backbone, "config", None)  # of one's own backbone or tokenizer there need be none
    sizes = as_dict(config) if is_dataclass(config) else config
    return [sizes, module.options() if isinstance(module, Student) else None]


def batches_of(num: int, batch: int) -> list[range]:
    check_whole("batch", batch, 1)
    return [range(first, min(first + batch, num)) for first in range(0, num, batch)]


def draw(pipe: DistilledPipeline, plan: Plan, labels_N: np.ndarray, part: range, seed: int) -> np.ndarray:
    """Images `part` of a set, uint8 [B,H,W,3]."""
    labels = labels_N[part.start : part.stop].tolist()
    return to_uint8(pipe.decode(pipe.emit(labels, plan, sample_generators(seed, part)).embeddings_BLC))


def draw_all(
    pipe: DistilledPipeline, plan: Plan, labels_N: np.ndarray, *, seed: int, batch: int, show_progress: bool = True
) -> Iterator[np.ndarray]:
    """The images of a set in order, a batch at a time; the processes of a launch make one each in turn.

    Raises:
        ValueError: one of the arguments is of another kind, or a label is no class.
    """
    check_kind("pipe", pipe, DistilledPipeline)
    check_kind("labels", labels_N, np.ndarray)
    check_whole("seed", seed, 0, LARGEST_SEED)
    parts = batches_of(len(labels_N), batch)
    made = in_turn(lambda part: draw(pipe, plan, labels_N, part, seed), parts)
    with tqdm(total=len(labels_N), unit="img", disable=not show_progress or rank() > 0, leave=False) as bar:
        for images_BHW3 in made:
            yield images_BHW3
            bar.update(len(images_BHW3))


def write_folder(
    pipe: DistilledPipeline,
    plan: Plan,
    settings: Settings,
    folder: str | Path,
    *,
    batch: int,
    show_progress: bool = True,
) -> int:
    """Sample the images of a set that are not in its folder yet; the processes of a launch share the batches.

    Args:
        pipe, plan: what `settings` were made of.
        folder: made if missing.
        batch: images per pass. Another one than before may move a pixel by one level, as rounding goes.

    Returns:
        The number of images made.

    Raises:
        ValueError: the folder holds images of other settings, more of them or a damaged one, or another run is at work
            in it.
        OSError: the disk is full, say. What is there is whole then.
    """
    check_kind("settings", settings, Settings)
    folder = as_path("a folder of images", folder)
    labels_N, note = settings.labels(), settings.note()
    names = [image_name(i, label) for i, label in enumerate(labels_N)]
    with held(folder):
        present = check_folder(folder, settings)
        meet()  # all have seen the same folder
        todo = [part for part in batches_of(settings.num, batch) if not present.issuperset(names[i] for i in part)]
        own = share(todo)
        with tqdm(total=sum(map(len, own)), unit="img", disable=not show_progress or rank() > 0, leave=False) as bar:
            for part in own:
                for i, image in zip(part, draw(pipe, plan, labels_N, part, settings.seed), strict=True):
                    if names[i] not in present:
                        write_aside(folder / names[i], png(Image.fromarray(image), note))
                bar.update(len(part))
    return settings.num - len(present)


def check_folder(folder: Path, settings: Settings) -> set[str]:
    """The names of the images that are there.

    Raises:
        ValueError: they are of other settings, more than `settings.num`, or one is damaged.
    """
    present = [path.name for path in pngs(folder)]
    if not present:
        return set()
    theirs, ours = read_note(folder / present[0]), settings.note()
    if theirs is None or not all(map(NAME.fullmatch, present)):
        raise ValueError(f"{folder} holds images that ddecode sample did not make; choose another --out")
    if keys := [key for key in ours if key != "model" and theirs.get(key) != ours[key]]:
        others = ", ".join(f"{key} ({brief(theirs.get(key))}, not {brief(ours[key])})" for key in keys)
        raise ValueError(f"{folder} holds images made with another {others}; choose another --out")
    last = max(int(name.partition("-")[0]) for name in present)
    if last >= settings.num:
        raise ValueError(f"{folder} holds {last + 1} images already; --num may only grow, got {settings.num}")
    for name in present:
        check_png(folder / name)
    return set(present)


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
