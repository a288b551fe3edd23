"""Upstream's states to our directory format and back, bit for bit.

On the way in, tensors keep their types. What only upstream's files carry goes under `upstream.PART.`, and the names
that a file lacked are listed in the config, so that the way out gives back exactly what came in. Models made here have
neither: they come out in the published layout, with upstream's derived buffers computed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ddecode.arguments import as_path, check_kind
from ddecode.checkpoint import ModelFolder, bundled_models, download, family_module, loaders, save_tensors, write_model
from ddecode.config import StudentConfig, build
from ddecode.files import read_json
from ddecode.student import DD1Student

KINDS = ("var", "llamagen", "dd1-var", "dd1-llamagen")
"""Of each family, its teachers and the students that DD1 published."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What no state tells; None takes the published value."""

    patch_nums: tuple[int, ...] | None = None
    n_head: int | None = None
    block_size: int | None = None
    num_classes: int | None = None
    """The first of the state's, where its table is larger than what was trained."""
    starts: tuple[int, ...] | None = None
    split: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def convert(
    source: str | Path, kind: str, out: str | Path, *, tokenizer: str | None = None, options: Options | None = None
) -> list[str]:
    """Convert a state to a model folder, or a model folder to states.

    Args:
        source: what to convert: upstream's file, folder or hub id, or a model in our format.
        kind: one of `KINDS`, which must be what `source` is or holds.
        out: the folder to make; it appears when it is complete.
        tokenizer: upstream's, on the way in; without it the model can be described and converted back, not sampled.
        options: sizes and defaults, on the way in.

    Returns:
        The parts that were written.

    Raises:
        ValueError: `source` is something else, its keys are missing, extra or misshapen, an option does not apply, or
            `out` is there already.
    """
    check_kind("options", options, Options, type(None))
    check_kind("what to convert", source, str, Path)
    source, out, options = str(source), as_path("--out", out), options or Options()  # a name of the hub is no path
    model = open_model(source)
    if model is None:
        return to_folder(source, kind, out, tokenizer, options)
    return to_states(model, kind, out, [*options.given, *(["tokenizer"] if tokenizer else [])])


def open_model(source: str) -> ModelFolder | None:
    """A model in our format; None where `source` is something else.

    Raises:
        ValueError: a name that is not bundled, a hub id that cannot be had, a damaged config.
    """
    path = Path(source)
    if source in bundled_models() or not (path.exists() or path.suffix or "/" in source):
        return ModelFolder.open(source)
    if not path.exists() and source.count("/") == 1 and loaders().is_hub_id(source):
        path = download(source)
    config = path / "config.json"
    if not config.is_file():
        return None
    tree = read_json(config)
    return ModelFolder.open(path) if isinstance(tree, dict) and {"format", "family"} & tree.keys() else None


def family_of(kind: str) -> str:
    return kind.removeprefix("dd1-").removesuffix("-tokenizer")


def adapter_of(kind: str) -> Any:
    """The `Adapter` of a kind of upstream's states."""
    return family_module(family_of(kind)).ADAPTERS[kind]


# --- in -------------------------------------------------------------------------------------------------------


def to_folder(source: str, kind: str, out: Path, tokenizer: str | None, options: Options) -> list[str]:
    """An upstream state to a model folder."""
    state = read_kind(source, kind)
    family = family_module(family_of(kind))
    is_student = adapter_of(kind).part == "student"
    check_options(options, (*family.SIZE_OPTIONS, "num_classes", *(("starts", "split") if is_student else ())), kind)
    check_new(out)
    if options.num_classes is not None:
        state = first_classes(state, adapter_of(kind).labels, options.num_classes)
    sizes = {name: value for name, value in options.given.items() if name in family.SIZE_OPTIONS}
    part = ConvertedPart.of(kind, state, adapter_of(kind).untold(source, sizes))
    parts = {part.name: part}
    if tokenizer is not None:
        tokenizer_kind = f"{family_of(kind)}-tokenizer"
        known = {name: getattr(part.sizes, name) for name in family.TOKENIZER_SIZES}
        codes = ConvertedPart.of(tokenizer_kind, read_kind(tokenizer, tokenizer_kind), known)
        check_codes(part.sizes, codes.sizes)
        parts = {codes.name: codes} | parts
    group = student_group(kind, part.sizes, options) if is_student else teacher_group(kind, part.sizes)
    config = {
        "family": family_of(kind),
        **{name: converted.sizes for name, converted in parts.items()},
        part.name: group,
        "upstream": {"absent": [name for converted in parts.values() for name in converted.absent]},
    }
    with new_folder(out) as folder:
        write_model(folder, config, {n: t for converted in parts.values() for n, t in converted.tensors.items()})
    return list(parts)


@dataclass(frozen=True, kw_only=True)
class ConvertedPart:
    """A teacher, student or tokenizer on its way into a model folder."""

    name: str
    sizes: Any
    tensors: dict[str, Tensor]
    """By their names in `model.safetensors`."""
    absent: list[str]
    """Names, after the part's, that a complete upstream state has and this one lacked."""

    @classmethod
    def of(cls, kind: str, state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> "ConvertedPart":
        """An upstream state of this kind; `sizes` are those that it does not tell.

        Raises:
            ValueError: keys are missing, extra or misshapen, or sizes do not fit.
        """
        adapter = adapter_of(kind)
        config, part = adapter.config(state, **sizes), adapter.part
        own = adapter.own(state, config)
        restored = adapter.restore(own)
        left = {f"upstream.{part}.{name}": tensor for name, tensor in state.items() if name not in restored}
        return cls(
            name=part,
            sizes=config,
            tensors={f"{part}.{name}": tensor for name, tensor in own.items()} | left,
            absent=[f"{part}.{name}" for name in restored | adapter.derived(config) if name not in state],
        )


def read_kind(source: str, kind: str) -> dict[str, Tensor]:
    """The tensors of a state that must be of this kind.

    Raises:
        ValueError: it cannot be read, or is of another kind, which is named.
    """
    wants_tokenizer = kind.endswith("-tokenizer")
    found_kind, found = loaders().identify(source, tokenizer=wants_tokenizer)
    if found_kind != kind:
        hint = f"give --family {found_kind}"
        if wants_tokenizer:
            hint = f"--tokenizer takes a {adapter_of(kind).title}"
        elif found_kind.endswith("-tokenizer"):
            hint = "give its transformer as STATE, and this with --tokenizer"
        raise ValueError(f"{source} is a {adapter_of(found_kind).title} ({found_kind}), not {kind}: {hint}")
    return dict(found.tensors)


def first_classes(state: Mapping[str, Tensor], labels: str, num_classes: int) -> dict[str, Tensor]:
    """A state without the classes from `num_classes` on; the unconditional row stays the last.

    Raises:
        ValueError: it has no table of classes, or fewer.
    """
    if labels not in state or not len(state[labels]):
        raise ValueError("--num-classes: this state has no table of classes")
    table, last = state[labels], len(state[labels]) - 1
    if not 1 <= num_classes <= last:
        raise ValueError(f"--num-classes must lie in 1..{last}, the classes of this state, got {num_classes}")
    return {**state, labels: torch.cat([table[:num_classes], table[last:]])}


def check_codes(model: Any, tokenizer: Any) -> None:
    """Whether a model's tokens are the tokenizer's.

    Raises:
        ValueError: the tokenizer has other codes than the model.
    """
    ours = (model.vocab_size, model.code_width or tokenizer.code_width)  # LlamaGen's teachers name no code width
    theirs = (tokenizer.vocab_size, tokenizer.code_width)
    if ours != theirs:
        raise ValueError(
            f"the model has {ours[0]} codes of width {ours[1]}, the tokenizer {theirs[0]} of width {theirs[1]}"
        )


def teacher_group(kind: str, sizes: Any) -> dict[str, Any]:
    """What the config says of a teacher."""
    recipe = family_module(family_of(kind)).pairs_recipe(sizes)
    return {"backbone": sizes, "recipe": dataclasses.replace(recipe, top_k=min(recipe.top_k, sizes.vocab_size))}


def student_group(kind: str, sizes: Any, options: Options) -> dict[str, Any]:
    """What the config says of a student.

    Raises:
        ValueError: starts or split do not fit the model.
    """
    starts, split = family_module(family_of(kind)).student_spans(sizes)
    starts, split = options.starts or starts, split if options.split is None else options.split
    StudentConfig(starts=starts)  # checks their order, and the next one the ranges
    with torch.device("meta"):
        blank = adapter_of(kind).blank(sizes)
        student = DD1Student(blank.backbone, blank.tokenizer, starts=starts, split=split)
    return {"backbone": sizes, **student.options()}


# --- out ------------------------------------------------------------------------------------------------------


def to_states(model: ModelFolder, kind: str, out: Path, refused: list[str]) -> list[str]:
    """A model folder to upstream's states: `model.safetensors` and, where there is one, `tokenizer.safetensors`."""
    family = model.config["family"]
    held = [k for k in KINDS if family_of(k) == family and model.has(adapter_of(k).part)]
    if kind not in held:
        known = " or ".join(held) or "none"
        raise ValueError(f"{model.path.name} is a ddecode model, not {kind}: it converts to --family {known}")
    if refused:
        raise ValueError(f"{flag(refused[0])} is for upstream's states, and {model.path.name} is a ddecode model")
    check_new(out)
    states = {"model": upstream_state(model, kind)}
    if model.has("tokenizer"):
        states["tokenizer"] = upstream_state(model, f"{family}-tokenizer")
    with new_folder(out) as folder:
        for name, state in states.items():
            save_tensors(folder / f"{name}.safetensors", state)
    return [adapter_of(kind).part, *list(states)[1:]]


def upstream_state(model: ModelFolder, kind: str) -> dict[str, Tensor]:
    """One part of a model in upstream's layout.

    Raises:
        ValueError: the folder is damaged, or its student is of a kind that upstream does not have.
    """
    adapter = adapter_of(kind)
    part = adapter.part
    if part == "student" and "split" not in model.require(part):
        raise ValueError(f"the student of {model.path.name} is not DD1's: upstream's layout cannot hold it")
    sizes = model.tokenizer_sizes() if part == "tokenizer" else model.backbone_sizes(part)
    state = adapter.upstream(model.state(part), sizes) | model.state(f"upstream.{part}")
    absent = build(dict[str, tuple[str, ...]], model.config.get("upstream", {}), "upstream").get("absent", ())
    return {name: tensor for name, tensor in state.items() if f"{part}.{name}" not in absent}


# --- options and folders --------------------------------------------------------------------------------------


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_options(options: Options, allowed: tuple[str, ...], kind: str) -> None:
    """Whether every option given means something for this kind.

    Raises:
        ValueError: one does not.
    """
    if wrong := [name for name in options.given if name not in allowed]:
        known = ", ".join(flag(name) for name in allowed)
        raise ValueError(f"{flag(wrong[0])} is no option of --family {kind}, which takes {known}")


def check_new(out: Path) -> None:
    """Whether `out` can be made without touching what is there.

    Raises:
        ValueError: it is a file or a folder with something in it.
    """
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise ValueError(f"--out {out} is there already: give a new or an empty folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and is gone when it does not."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        folder = Path(aside) / out.name
        folder.mkdir()
        yield folder
        folder.replace(out)
