"""Model cards: a README.md for the hub, made of a model folder, its recipe and a result of `ddecode eval`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ddecode.arguments import as_path, check_kind
from ddecode.checkpoint import PARTS, RECIPE, ModelFolder, UploadOptions
from ddecode.config import build
from ddecode.evaluation.results import figure, read_result
from ddecode.files import write_aside

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
USE = """```python
import torch
from ddecode import DistilledPipeline

pipe = DistilledPipeline.from_pretrained("{model}")
out = pipe(class_labels={labels}, num_inference_steps={steps}, generator=torch.Generator().manual_seed(0))
out.images[0].save("sample.png")
```"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model folder does not know of itself.

    Raises:
        ValueError: a licence or the teacher is empty, or there is no such recipe or result.
    """

    license: str
    """Of these weights, as the hub names licences: mit, apache-2.0, cc-by-nc-4.0, other, ..."""
    teacher: str
    """Which model these were distilled from, or are; a hub id becomes the card's `base_model`."""
    teacher_license: str
    datasets: tuple[str, ...] = ()
    """Hub ids of what the teacher was trained on."""
    recipe: str | Path | None = None
    """YAML of the distillation; None is the folder's `recipe.yaml`, where there is one."""
    metrics: str | Path | None = None
    """What `ddecode eval --json` wrote; None says that nothing was measured."""

    def __post_init__(self) -> None:
        for name in ("license", "teacher", "teacher_license"):
            check_kind(f"the card's {name}", getattr(self, name), str)
            if not getattr(self, name).strip():
                raise ValueError(f"the card needs {name}: others have to know what they may do with the weights")
        for name in ("recipe", "metrics"):
            if getattr(self, name) is None:
                continue
            path = as_path(f"the card's {name}", getattr(self, name))
            if not path.is_file():
                raise ValueError(f"the card's {name}: there is no file {path}")
            object.__setattr__(self, name, path)
        object.__setattr__(self, "datasets", build(tuple[str, ...], self.datasets, "the card's datasets"))


def check_upload(card: Card | None, hub_id: Any, options: Mapping[str, Any]) -> None:
    """What is to go up, before anything is written.

    Raises:
        ValueError: there is no card, the id is no text, or an option is none of `ddecode.checkpoint.upload`.
    """
    if card is None:
        raise ValueError("push_to_hub needs a card: card=Card(license=..., teacher=..., teacher_license=...)")
    check_kind("card", card, Card)
    check_kind("repo_id", hub_id, str)
    if unknown := [name for name in options if name not in UploadOptions.__annotations__]:
        known = ", ".join(UploadOptions.__annotations__)
        raise ValueError(f"push_to_hub knows {known}, not {', '.join(unknown)}")


def write_card(folder: str | Path, card: Card, *, model: str) -> Path:
    """Write a model folder's README.md, and put its recipe beside it.

    Args:
        folder: a model folder, whole.
        card: what it does not know of itself.
        model: the name or hub id that people will load it by.

    Returns:
        The path of the card.

    Raises:
        ValueError: the folder or the result is damaged. Nothing is written then.
    """
    folder = as_path("a model folder", folder)
    check_kind("card", card, Card)
    check_kind("the model's name", model, str)
    opened = ModelFolder.open(folder)
    recipe = opened.training_recipe() if card.recipe is None else Path(card.recipe).read_text()
    text = front_matter(opened, card) + "\n\n".join(sections(opened, card, model, recipe)) + "\n"
    if recipe is not None:
        write_aside(folder / RECIPE, recipe.encode())
    write_aside(folder / "README.md", text.encode())
    return folder / "README.md"


def front_matter(model: ModelFolder, card: Card) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=card.license,
        library_name="ddecode",
        pipeline_tag="text-to-image" if takes_captions(model) else "unconditional-image-generation",
        tags=["ddecode", "distilled-decoding", "autoregressive", model.config["family"]],
        datasets=list(card.datasets) or None,
        base_model=card.teacher if HUB_ID.fullmatch(card.teacher) else None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def sections(model: ModelFolder, card: Card, name: str, recipe: str | None) -> list[str]:
    """The body, a paragraph or block at a time."""
    starts = model.config["student"]["starts"] if model.has("student") else []
    student = f"a student of it that samples in {counted(len(starts))}" if starts else "no student"
    labels = "(features_BPE, mask_BP)" if takes_captions(model) else "[0]"
    measured = "Not measured yet." if card.metrics is None else metrics(read_result(Path(card.metrics)), model)
    return [
        f"# {name.rpartition('/')[2]}",
        f"A `{model.config['family']}` image model in ddecode's format with {student}: Distilled Decoding "
        "([arXiv 2412.17153](https://arxiv.org/abs/2412.17153)) maps noise to all tokens of an autoregressive teacher.",
        "\n".join(
            [
                f"* **Teacher**: {card.teacher}. Its licence: {card.teacher_license}.",
                f"* **Licence of these weights**: {card.license}.",
                f"* **Weights**: {', '.join(f'{part} {size}' for part, size in sizes(model).items())}.",
                *([f"* **Starts**: {', '.join(map(str, starts))} tokens resolved."] if starts else []),
            ]
        ),
        "## Use",
        USE.format(model=name, labels=labels, steps=1 if starts else '"teacher"'),
        "## Recipe",
        "Not recorded." if recipe is None else f"```yaml\n{recipe.strip()}\n```",
        "## Metrics",
        measured,
    ]


def takes_captions(model: ModelFolder) -> bool:
    part = "student" if model.has("student") else "teacher"
    return getattr(model.backbone_sizes(part), "caption_width", None) is not None


def counted(steps: int) -> str:
    return "1 step" if steps == 1 else f"1 to {steps} steps"


def sizes(model: ModelFolder) -> dict[str, str]:
    """By part, its number of weights and their types on disk."""
    if not model.weights.is_file():
        raise ValueError(f"{model.path} has no model.safetensors")
    found: dict[str, str] = {}
    try:
        with safe_open(model.weights, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            for part in PARTS:
                own = [piece for key, piece in slices.items() if key.startswith(f"{part}.")]
                if own:
                    types = ", ".join(sorted({piece.get_dtype() for piece in own}))
                    found[part] = f"{sum(math.prod(piece.get_shape()) for piece in own):,} ({types})"
    except SafetensorError as error:
        raise ValueError(f"{model.weights} is damaged: {error}") from None
    return found


def metrics(result: Mapping[str, Any], model: ModelFolder) -> str:
    """A result with all that its figures rest on, as a table; columns without a figure are left out."""
    rows = result["rows"]
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [columns, ["---"] * len(columns), *([figure(row[name]) for name in columns] for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    facts = (
        "Protocol `{protocol}`, n {num}, seed {seed}, labels {labels}; model `{model}`, features `{feature_hash}`, "
        "reference `{reference_hash}`; {rounding}; "
    )
    return f"{facts.format_map(result)}{versions}.{whose(result, model)}\n\n{table}"


def whose(result: Mapping[str, Any], model: ModelFolder) -> str:
    """A sentence for figures of other weights than this folder's, be they others or the same before rounding."""
    theirs = result.get("model_hash")
    if theirs is None or theirs == (ours := model.model_hash()):
        return ""
    return f" Measured on weights `{theirs}`; those of this folder are `{ours}`."
