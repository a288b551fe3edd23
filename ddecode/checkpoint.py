"""Our directory format, the bundled models and the hub: from a model's name to its parts.

A model is a folder with `config.json` (family, sizes, recipe, starts) and `model.safetensors`, whose keys carry the
prefixes `tokenizer.`, `teacher.` and `student.`; teacher or student may be absent. The config's group `others` names
further models of the same tokens, for plans that stitch teachers. In a converted model the tokenizer may be absent
too, and `upstream.PART.` holds what only upstream's files carry: see `ddecode.conversion`.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddecode.arguments import check_kind
from ddecode.config import as_dict, build, chosen
from ddecode.files import placed, read_json, read_tensors, write_aside
from ddecode.student import Student
from ddecode.teacher import Recipe, Teacher
from ddecode.types import Tokenizer
from ddecode.yaml_text import read_text

FAMILIES = {"llamagen": "third_party_loaders.llamagen", "var": "third_party_loaders.var"}
"""By family, the module that builds its tokenizers, teachers and students."""
FORMAT = 1
PARTS = ("tokenizer", "teacher", "student")
MODEL_FILES = ("config.json", "model.safetensors")
RECIPE = "recipe.yaml"
"""The recipe of the distillation, as YAML, where it is known."""
CARD_FILES = ("README.md", RECIPE)
STUDENT_OPTIONS: dict[str, dict[str, Any]] = {
    "drafts": {"drafts": tuple[int, ...], "joins": int, "num_steps": int, "draft_steps": int},
    "exits": {"exits": tuple[int, ...], "joins": int, "num_steps": int},
    "wavefront": {"wavefront": int, "num_steps": int},
    "head_depth": {"head_depth": int, "noise_level": float},
    "split": {"split": int},
}
"""What a config says of a student beside its starts, by the option that tells its kind: drafting, staggered, wavefront,
DD2's or DD1's."""


def family_module(family: str) -> ModuleType:
    """Import a family's loader.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}; known are {', '.join(FAMILIES)}")
    return importlib.import_module(FAMILIES[family])


def saved_family(backbone: object, tokenizer: object, told: str | None) -> str:
    """The family whose loader builds these again: the one told, if it is one of `FAMILIES`, or the first that fits.

    Raises:
        ValueError: there is none.
    """
    sizes, codes = (getattr(part, "config", None) for part in (backbone, tokenizer))
    for family in [told] if told in FAMILIES else FAMILIES:
        loader = family_module(family)
        if isinstance(sizes, loader.BackboneConfig) and isinstance(codes, loader.TokenizerConfig):
            return family
    raise ValueError(
        f"only models of {', '.join(FAMILIES)} can be saved, and {type(backbone).__name__} with "
        f"{type(tokenizer).__name__} is neither"
    )


def loaders() -> ModuleType:
    """The package of the families, for states in upstream's layouts."""
    return importlib.import_module("third_party_loaders")


def zoo_folder() -> Path:
    """Where the bundled models lie: package data."""
    return Path(str(resources.files("ddecode"))) / "zoo"


def bundled_models() -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in zoo_folder().glob("*/config.json")))


@dataclass(frozen=True, kw_only=True)
class HubAccess:
    """How a model is fetched from the hub; None leaves the choice to huggingface_hub and its environment variables."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    """Take what the cache holds and leave the network alone, as `HF_HUB_OFFLINE=1` does."""

    def __post_init__(self) -> None:
        check_kind("revision", self.revision, str, type(None))
        check_kind("cache_dir", self.cache_dir, str, Path, type(None))
        check_kind("token", self.token, str, bool, type(None))
        check_kind("local_files_only", self.local_files_only, bool)


class UploadOptions(TypedDict, total=False):
    """See `upload`."""

    private: bool | None
    token: str | bool | None
    commit_message: str | None
    create_pr: bool


def find_model(model: str | Path, access: HubAccess | None = None) -> Path:
    """The folder of a bundled name, a local directory or a hub id (`owner/name`), in this order.

    Raises:
        ValueError: it is none of these, or the hub has no such model.
    """
    check_kind("a model's name", model, str, Path)
    if str(model) in bundled_models():
        return zoo_folder() / str(model)
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no model folder: it has no config.json")
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; a model is a folder with config.json and model.safetensors")
    if str(model).count("/") != 1 or str(model).startswith((".", "/")):
        raise ValueError(f"unknown model {str(model)!r}: bundled are {', '.join(bundled_models())}; or give a folder")
    folder = download(str(model), access)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model} is no model: it has no config.json")
    return folder


def download(hub_id: str, access: HubAccess | None = None) -> Path:
    """Fetch what a repository of the hub has of a model, or find it in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, allow_patterns=[*MODEL_FILES, RECIPE], **asdict(access or HubAccess()))
    except hub_errors() as error:
        raise ValueError(f"no local folder {hub_id!r}, and the hub does not give it: {first_line(error)}") from None
    return Path(folder)


def hub_errors() -> Any:
    """What the hub and the way there raise."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # the bases hold the HTTP client's own error; which client it is depends on the version of huggingface_hub
    return (*HfHubHTTPError.__bases__, HFValidationError, LocalEntryNotFoundError, OSError)


def first_line(error: BaseException) -> str:
    """What an error says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def upload(
    folder: Path,
    hub_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put a model folder on the hub, in a repository that is made if there is none.

    Args:
        folder: its config, weights, card and recipe go up, nothing else.
        hub_id: `owner/name`, or a name of one's own.
        private: of a new repository; None is the owner's default.
        token: None is the one that `hf auth login` stored.
        commit_message: None is huggingface_hub's.
        create_pr: open a pull request instead of committing.

    Returns:
        The address of the commit or pull request.

    Raises:
        ValueError: the folder lacks a file or its card, or the hub refuses.
    """
    from huggingface_hub import HfApi

    if missing := [name for name in (*MODEL_FILES, "README.md") if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {', '.join(missing)}: see DistilledPipeline.save_pretrained and its card")
    try:
        api = HfApi(token=token)
        whole_id = api.create_repo(hub_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=whole_id,
            folder_path=folder,
            allow_patterns=[*MODEL_FILES, *CARD_FILES],
            commit_message=commit_message,
            create_pr=create_pr,
        )
    except hub_errors() as error:
        raise ValueError(f"the hub does not take {hub_id!r}: {first_line(error)}") from None
    return commit.pr_url or commit.commit_url


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model on disk; its parts are read when asked for."""

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def open(cls, model: str | Path, access: HubAccess | None = None) -> "ModelFolder":
        """Find a model and read its config.

        Raises:
            ValueError: it does not exist, or its config is damaged or of another format.
        """
        path = find_model(model, access)
        config = read_json(path / "config.json")
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ValueError(f"{path / 'config.json'} is no ddecode model of format {FORMAT}")
        if not isinstance(config.get("family"), str):
            raise ValueError(f"{path / 'config.json'} lacks family")
        return cls(path=path, config=config)

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def family(self) -> ModuleType:
        return family_module(self.config["family"])

    def training_recipe(self) -> str | None:
        """The YAML of the distillation, where it is known."""
        path = self.path / RECIPE
        return read_text(path) if path.is_file() else None

    def has(self, part: str) -> bool:
        return part in self.config

    def require(self, part: str) -> Mapping[str, Any]:
        if part not in self.config:
            hint = ": convert it again with --tokenizer" if part == "tokenizer" else ""
            raise ValueError(f"{self.path.name} has no {part}{hint}")
        return build(dict[str, Any], self.config[part], part)

    def state(self, part: str) -> dict[str, Tensor]:
        """One part's tensors, as stored.

        Raises:
            ValueError: the weights are missing or damaged.
        """
        return read_tensors(self.weights, f"{part}.")

    def tokenizer(self) -> Tokenizer:
        return self.family.build_tokenizer(self.tokenizer_sizes(), self.state("tokenizer"))

    def tokenizer_sizes(self) -> Any:
        """The family's config of its tokenizer."""
        return build(self.family.TokenizerConfig, self.require("tokenizer"), "tokenizer")

    def backbone_sizes(self, part: str) -> Any:
        """The family's config of one part's backbone."""
        return build(self.family.BackboneConfig, self.require(part).get("backbone"), f"{part}.backbone")

    def teacher(self, tokenizer: Tokenizer | None = None) -> Teacher:
        """The teacher, in evaluation mode, fp32, on the CPU."""
        group = self.require("teacher")
        recipe = build(Recipe, group.get("recipe", {}), "teacher.recipe")
        sizes = self.backbone_sizes("teacher")
        return self.family.build_teacher(sizes, tokenizer or self.tokenizer(), self.state("teacher"), recipe)

    def student(self, tokenizer: Tokenizer | None = None) -> Student:
        """The student, in evaluation mode, fp32, on the CPU."""
        return self.family.build_student(
            self.backbone_sizes("student"),
            tokenizer or self.tokenizer(),
            self.state("student"),
            **self.student_options(),
        )

    def student_options(self) -> dict[str, Any]:
        """What the config says of the student beside its backbone; see `Student.options`."""
        group = {key: value for key, value in self.require("student").items() if key != "backbone"}
        if "head_depth" in group:  # earlier versions knew no other level
            group = {"noise_level": 1.0} | group
        own = next((own for key, own in STUDENT_OPTIONS.items() if key in group), STUDENT_OPTIONS["split"])
        options = {"starts": tuple[int, ...], **own}
        if set(group) != set(options):
            raise ValueError(f"the student group of {self.path.name} must hold {', '.join(['backbone', *options])}")
        return {key: build(options[key], value, f"student.{key}") for key, value in group.items()}

    def others(self, access: HubAccess | None = None) -> dict[str, Teacher]:
        """The teachers of other models that its plans may name: the config's group `others`, NAME to MODEL."""
        named = build(dict[str, str], self.config.get("others", {}), "others")
        own = replace(access or HubAccess(), revision=None)
        return {name: ModelFolder.open(model, own).teacher() for name, model in named.items()}

    def teacher_hash(self) -> str:
        """Tells teachers apart: the hash of weights and sizes of tokenizer and teacher, 16 hex digits. The same weights
        with other heads, say, give other tokens."""
        sizes = [self.backbone_sizes("teacher"), *([self.tokenizer_sizes()] if self.has("tokenizer") else [])]
        told = json.dumps([self.weights_hash("tokenizer", "teacher"), *map(chosen, sizes)], default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def model_hash(self) -> str:
        """Tells models apart: the hash of the weights of all its parts, 16 hex digits."""
        return self.weights_hash(*(part for part in PARTS if self.has(part)))

    def weights_hash(self, *parts: str) -> str:
        """SHA-256 over the fp32 weights of some parts, 16 hex digits."""
        digest = hashlib.sha256()
        for part in parts:
            for name, tensor in sorted(self.state(part).items()):
                digest.update(f"{part}.{name}".encode())
                plain = tensor.float() if tensor.is_floating_point() else tensor
                digest.update(plain.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_teacher(model: str | Path) -> Teacher:
    """The teacher of a bundled name, a directory or a hub id; see `find_model`."""
    return ModelFolder.open(model).teacher()


def save_model(
    folder: Path,
    config: Mapping[str, Any],
    parts: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Write a model folder; weights first, aside, so that a folder with a config is whole.

    Args:
        folder: made if missing.
        config: the content of `config.json` without its format.
        parts: modules by the names in `PARTS`; the teacher's is its backbone.
        dtype: of floating weights on disk; None is what each has in memory.
    """
    tensors = {
        f"{part}.{name}": tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    write_model(folder, config, tensors)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a `.safetensors` file of tensors as they are; tied ones, which the format refuses, are written apart."""
    plain: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        if plain[name].data_ptr() in places:
            plain[name] = plain[name].clone()
        places.add(plain[name].data_ptr())
    with placed(path) as aside:
        aside.touch()
        mode = aside.stat().st_mode
        save_file(plain, aside)
        aside.chmod(mode)  # safetensors makes files that nobody but their owner may read


def write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """`save_model` of tensors as they are, under the names they have in the file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    plain = json.dumps({"format": FORMAT, **config}, indent=2, default=as_dict) + "\n"
    write_aside(folder / "config.json", plain.encode())
