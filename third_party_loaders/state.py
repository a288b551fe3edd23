"""State dicts as people have them: reading files without running code, unwrapping, strict loading."""

import argparse
import mmap
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ddecode.arguments import shown
from ddecode.files import read_json, read_tensors

StateOrPath = Mapping[str, Any] | str | Path
ModuleType = TypeVar("ModuleType", bound=nn.Module)

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
INDEX = ".safetensors.index.json"
"""How the name of the list of a sharded state's files ends."""
WRAPPERS = ("model", "module", "state_dict", "ema", "trainer", "var_wo_ddp", "ema_parameters", "vae_local")
"""Keys under which training code nests the weights."""
INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that compiling and sharding put in, at any depth."""

GROWING = b"bytearray"
ZIP = b"PK\x03\x04"
"""How zip files begin."""
DEEPEST = 8
"""Wrappers inside each other."""

# --- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Found:
    """Weights, and where they lay."""

    tensors: dict[str, Tensor]
    wrapper: str
    """The keys they were nested under, joined by dots; empty for a bare state."""


def read_state(source: StateOrPath, preferred: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A flat dict of tensors from a dict, a file, a folder with one state, or the hub.

    Args:
        source: the state itself, possibly wrapped; a `.safetensors`, `.pt`, `.pth` or `.bin` file; a folder that holds
            one; a hub id, `owner/name` or `owner/name/file`.
        preferred: which of `WRAPPERS` to take first where a file holds several.

    Returns:
        Tensors as stored, mapped from the file where its format allows; names without `module.` and the like.

    Raises:
        ValueError: no such file, a damaged or unknown one, or one that holds more than tensors and plain values.
    """
    return unwrap(read_tree(source), preferred, title(source)).tensors


def title(source: StateOrPath) -> str:
    """What errors call it."""
    return "the state" if isinstance(source, Mapping) else str(source)


def file_name(source: StateOrPath) -> str:
    """Of the file that a state lies in; empty where there is none, or it is not known before it is read."""
    if isinstance(source, Mapping):
        return ""
    try:
        return file_of(Path(source)).name
    except ValueError:  # which reading it will say
        return ""


def read_tree(source: StateOrPath) -> Mapping[str, Any]:
    """What a file or a folder holds, wrappers and all; a dict is itself."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | Path):
        raise ValueError(f"a state is a dict of tensors, a file, a folder or a hub id, got {shown(source)}")
    path = Path(source)
    if not path.exists() and is_hub_id(str(source)):
        return read_file(download(str(source)))
    return read_file(file_of(path))


def is_hub_id(text: str) -> bool:
    """`owner/name`, or `owner/name/file` with a known suffix; nothing below an existing folder."""
    parts = text.split("/")
    if len(parts) < 2 or not all(parts) or parts[0].startswith((".", "~")) or Path(parts[0]).exists():
        return False
    return text.endswith(SUFFIXES) == (len(parts) > 2)


def file_of(path: Path) -> Path:
    """A file itself, of a folder the one that is its state.

    Raises:
        ValueError: see `choose`.
    """
    if not path.is_dir():
        return path
    return path / choose([file.name for file in path.iterdir() if file.is_file()], str(path))


def choose(names: Iterable[str], where: str) -> str:
    """Of a folder's files, the one that is its state.

    Raises:
        ValueError: there is none, or several and none has a usual name.
    """
    found = sorted(name for name in names if name.endswith((*SUFFIXES, INDEX)))
    usual = ("model.safetensors", f"model{INDEX}", "pytorch_model.bin")
    if best := [name for name in usual if name in found]:
        return best[0]
    if len(found) != 1:
        many = f"several files with weights, {preview(found)}: name one" if found else "no file with weights"
        raise ValueError(f"{where} holds {many}")
    return found[0]


def download(hub_id: str) -> Path:
    """Fetch a state from the hub, or find it in the hub's cache."""
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, name, *file = hub_id.split("/", 2)
    repo = f"{owner}/{name}"
    try:
        chosen = file[0] if file else choose(list_repo_files(repo), f"hub repository {repo}")
        path = Path(hf_hub_download(repo, chosen))
        for shard in shards_of(path) if chosen.endswith(INDEX) else ():
            hf_hub_download(repo, shard)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"no local file {hub_id!r}, and the hub does not give it: {reason}") from None
    return path


def shards_of(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        ValueError: it is damaged, or names files outside its folder.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is damaged: it is no index of shards") from None
    if not all(isinstance(name, str) and name.endswith(".safetensors") and name == Path(name).name for name in names):
        raise ValueError(f"{index} is damaged: shards are .safetensors files beside it")
    return names


def read_file(path: Path) -> dict[str, Any]:
    """What one file holds; no code from it is run.

    Raises:
        ValueError: it is missing, damaged, of another format, or asks for more than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint file {path}")
    if path.name.endswith(INDEX):
        return {name: tensor for shard in shards_of(path) for name, tensor in read_file(path.parent / shard).items()}
    if path.suffix == ".safetensors":
        return dict(read_tensors(path))
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not path.stat().st_size:
        raise ValueError(f"{path} cannot be read safely: it is damaged")
    check_growth(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file, and advises to read it unsafely
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}, and only tensors and plain values are read" if asked else "it is damaged"
        raise ValueError(f"{path} cannot be read safely: {reason}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no dict of weights")
    return tree


def check_growth(path: Path) -> None:
    """Refuse what would grow when it is read: compressed parts, which torch does not write, and the one kind that
    torch's safe reading makes as large as the file wants.

    Raises:
        ValueError: there is either, or a zip file is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts = archive.infolist()
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                    raise ValueError(
                        f"{path} cannot be read safely: parts of it are compressed, which torch never does"
                    )
                pickles = [archive.read(part) for part in parts if part.filename.endswith(".pkl")]
                asks = any(GROWING in text for text in pickles)
        else:
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
                if text[:4] == ZIP:
                    raise zipfile.BadZipFile("its end is missing, which torch would look for before its beginning")
                asks = text.find(GROWING) >= 0
    except (zipfile.BadZipFile, EOFError, RuntimeError):
        raise ValueError(f"{path} cannot be read safely: it is damaged") from None
    if asks:
        raise ValueError(f"{path} cannot be read safely: it asks for {GROWING.decode()}, and only tensors are read")


def unwrap(tree: Mapping[str, Any], preferred: tuple[str, ...], what: str) -> Found:
    """The weights inside what training code saved.

    Raises:
        ValueError: there are none, or two names become one without what wrappers put in.
    """
    wrappers = tuple(dict.fromkeys((*preferred, *WRAPPERS)))
    path: list[str] = []
    while not all(isinstance(v, Tensor) for v in tree.values()):
        key = next((w for w in wrappers if isinstance(tree.get(w), Mapping) and tree[w]), None)
        if key is None or len(path) == DEEPEST:
            expected = f"expected tensors, or one of {', '.join(wrappers)}"
            raise ValueError(f"found no weights in {what}: {expected}; got {preview(tree)}")
        tree, path = tree[key], [*path, key]
    if not tree:
        raise ValueError(f"{what} is empty")
    if odd := [name for name, tensor in tree.items() if not is_plain(tensor)]:
        raise ValueError(f"{what} holds other tensors than plain numbers: {preview(odd)}")
    return Found(tensors=plain_names(tree), wrapper=".".join(path))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are there one by one: neither sparse or quantised nor a few that are to be repeated,
    which would be as large in memory as the file wants."""
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def plain_names(state: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Names as the bare model has them: without inserted parts, and without a `module.` that all begin with."""
    names = {name: INSERTED.sub("", str(name)) for name in state}
    while all(name.startswith("module.") for name in names.values()):
        names = {old: name.removeprefix("module.") for old, name in names.items()}
    plain: dict[str, Tensor] = {}
    for old, name in names.items():
        if name in plain:
            raise ValueError(f"two tensors of this state are {name} once wrappers are taken off; one was {old}")
        plain[name] = state[old]
    return plain


def preview(names: Iterable[Any]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# --- loading --------------------------------------------------------------------------------------------------


def meta_module(make: Callable[[], ModuleType]) -> ModuleType:
    """Build a module without memory for its weights; `load_strictly` then assigns them."""
    with torch.device("meta"):
        return make()


def built(make: Callable[[], ModuleType], state: Mapping[str, Tensor] | None, what: str) -> ModuleType:
    """A module in evaluation mode: as it was made, or with `state` assigned by `load_strictly`."""
    if state is None:
        return make().eval()
    module = meta_module(make)
    load_strictly(module, state, what)
    return module.eval()


def check_names(target: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Compare the names, shapes and kinds of numbers of `state` with those of `target`.

    Raises:
        ValueError: keys are missing, extra, misshapen or of another kind; they are named in one line.
    """
    problems = []
    if missing := [n for n in target if n not in state]:
        problems.append(f"missing {preview(missing)}")
    if extra := [n for n in state if n not in target]:
        problems.append(f"unknown {preview(extra)}")
    shapes = [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(target[n].shape)}"
        for n in target
        if n in state and state[n].shape != target[n].shape
    ]
    kinds = [
        f"{n} is {str(state[n].dtype).removeprefix('torch.')}"
        for n in target
        if n in state and target[n].is_floating_point() and not state[n].is_floating_point()
    ]
    if kinds:
        problems.append(f"not floating: {preview(kinds)}")
    if shapes:
        problems.append(
            "misshapen " + "; ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
        )
    if problems:
        raise ValueError(f"this state is no {what}: " + "; ".join(problems))


def is_finite(tensor: Tensor) -> bool:
    """By the sum, as fast as reading; where that is not finite, as that of large numbers may be, each by itself."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Assign `state` to `module` in fp32, by name; fp32 tensors are taken without a copy.

    Raises:
        ValueError: keys are missing, extra, misshapen or of another kind, or not all numbers are finite; they are named
            in one line.
    """
    check_names(module.state_dict(), state, what)
    if wrong := [n for n, t in state.items() if not is_finite(t)]:
        raise ValueError(f"this state is no {what}: NaN or infinity in {preview(wrong)}")
    floats = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    module.load_state_dict(floats, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
