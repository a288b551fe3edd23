"""Noise-token pairs on disk: writing, resuming, verifying, reading.

A folder of pairs holds `manifest.json` (what they are made with) and `shard-00000.safetensors`, ... of `shard_size`
samples each. A shard keeps the seed of each sample's noise instead of the noise, its tokens and its label, and a
checksum of those. A shard appears under its name only when it is whole, and depends on the manifest alone: stopping
and going on gives the same bytes. One run at a time works in a folder.

N samples of a shard, L token positions, C code width.
"""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ddecode.arguments import LARGEST_SEED, as_path, check_kind, check_whole, shown
from ddecode.config import PairsConfig, as_dict, build
from ddecode.files import read_json, write_aside
from ddecode.locks import held
from ddecode.processes import in_turn, meet, rank
from ddecode.randomness import sample_seed
from ddecode.teacher import Recipe, Teacher
from ddecode.trajectory import resolve

TOKEN_DTYPE = torch.int32
DTYPES = {"ids": TOKEN_DTYPE, "labels": TOKEN_DTYPE, "seeds": torch.int64}
"""What a shard holds."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of pairs is made with. `num` may grow, the teacher may be renamed; all else is their identity."""

    teacher: str
    teacher_hash: str
    num: int
    length: int
    code_width: int
    num_classes: int
    recipe: dict[str, Any]
    num_steps: int
    seed: int
    batch: int
    shard_size: int
    precision: Literal["no", "bf16"]

    def __post_init__(self) -> None:
        for name in ("num", "length", "code_width", "num_classes", "num_steps", "batch", "shard_size"):
            check_whole(f"manifest.{name}", getattr(self, name), 1)
        check_whole("manifest.seed", self.seed, 0, LARGEST_SEED)
        build(Recipe, self.recipe, "manifest.recipe")

    def identity(self) -> dict[str, Any]:
        return {key: value for key, value in as_dict(self).items() if key not in ("num", "teacher")}

    def as_config(self, own: Recipe) -> PairsConfig:
        """What made them; the teacher's own recipe is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(PairsConfig)}
        if self.recipe == as_dict(own):
            values["recipe"] = None
        return build(PairsConfig, values, "manifest")

    @property
    def shards(self) -> int:
        return -(-self.num // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """The samples of one shard."""
        return range(shard * self.shard_size, min(self.num, (shard + 1) * self.shard_size))

    def batches(self, shard: int) -> list[range]:
        """The same, in the batches that the teacher is walked in."""
        samples = self.shard_range(shard)
        return [samples[first : first + self.batch] for first in range(0, len(samples), self.batch)]

    def seeds(self, samples: range) -> list[int]:
        """Of their noise."""
        return [sample_seed(self.seed, i) for i in samples]

    def labels(self, samples: range) -> Tensor:
        """int64 [N]."""
        return torch.tensor([i % self.num_classes for i in samples])


def make_manifest(teacher: Teacher, name: str, teacher_hash: str, config: PairsConfig) -> Manifest:
    """
    Raises:
        ValueError: the teacher takes captions, for which no student is defined.
    """
    check_kind("teacher", teacher, Teacher)
    check_kind("config", config, PairsConfig)
    if not teacher.num_classes:
        raise ValueError(f"{name} takes captions: students are defined for class labels only")
    return Manifest(
        teacher=name,
        teacher_hash=teacher_hash,
        num=config.num,
        length=teacher.length,
        code_width=teacher.codebook_VC.shape[1],
        num_classes=teacher.num_classes,
        recipe=as_dict(config.recipe or teacher.recipe),
        num_steps=config.num_steps,
        seed=config.seed,
        batch=config.batch,
        shard_size=config.shard_size,
        precision=config.precision,
    )


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """Raises ValueError: the folder holds no pairs, or their manifest is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no pairs (no manifest.json); make some with ddecode pairs")
    try:
        return build(Manifest, read_json(path), "manifest")
    except ValueError:
        raise ValueError(f"{path} is damaged; delete the folder and make the pairs again") from None


def noise_of(seeds: list[int], shape: tuple[int, int]) -> Tensor:
    """fp32 [N,L,C], each sample's from its own seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def write_pairs(teacher: Teacher, manifest: Manifest, folder: str | Path, *, show_progress: bool = True) -> int:
    """Make the shards that are not there yet; the processes of a launch make a batch each in turn.

    Returns:
        The number of pairs made.

    Raises:
        ValueError: the folder holds pairs of another manifest or a damaged shard, or another run is at work in it.
        OSError: the disk is full, say. What is there is whole then.
    """
    check_kind("teacher", teacher, Teacher)
    check_kind("manifest", manifest, Manifest)
    folder = as_path("a folder of pairs", folder)
    with held(folder):
        check_manifest(folder, manifest)
        todo = [s for s in range(manifest.shards) if not is_complete(folder, manifest, s)]
        meet()  # all have seen the same folder
        main = rank() == 0
        if main:
            write_aside(folder / "manifest.json", (json.dumps(as_dict(manifest), indent=2) + "\n").encode())
        batches = [samples for shard in todo for samples in manifest.batches(shard)]
        made = in_turn(partial(make_batch, teacher, manifest), batches)
        total = sum(map(len, batches))
        with tqdm(total=total, unit="img", disable=not (show_progress and main), desc="pairs") as bar:
            for shard in todo:
                ids = []
                for samples in manifest.batches(shard):
                    ids.append(next(made))
                    bar.update(len(samples))
                if main:
                    write_aside(shard_path(folder, shard), shard_of(manifest, shard, torch.cat(ids)))
    return total


def check_manifest(folder: Path, manifest: Manifest) -> None:
    """
    Raises:
        ValueError: the folder holds pairs of another manifest, or more of them.
    """
    if not (folder / "manifest.json").exists():
        return
    present = read_manifest(folder)
    if present.identity() != manifest.identity():
        ours, theirs = manifest.identity(), present.identity()
        keys = ", ".join(f"{k} ({theirs[k]!r}, not {ours[k]!r})" for k in ours if ours[k] != theirs[k])
        raise ValueError(f"{folder} holds pairs made with another {keys}; choose another --out")
    if manifest.num < present.num and manifest.num < (made := pairs_made(folder, present)):
        raise ValueError(f"{folder} holds {made} pairs already; --num may only grow, got {manifest.num}")


def pairs_made(folder: Path, manifest: Manifest) -> int:
    """Up to the last shard that is there: shards are made in order.

    Raises:
        ValueError: that one is damaged.
    """
    there = [shard for shard in range(manifest.shards) if shard_path(folder, shard).exists()]
    return there[-1] * manifest.shard_size + len(read_shard(shard_path(folder, there[-1]))["seeds"]) if there else 0


def is_complete(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Whether a shard is there with all its samples; a shard that was the short last one is made again.

    Raises:
        ValueError: it is damaged, or another one.
    """
    if not shard_path(folder, shard).exists():
        return False
    return len(manifest_shard(folder, manifest, shard)["seeds"]) == len(manifest.shard_range(shard))


def manifest_shard(folder: Path, manifest: Manifest, shard: int) -> dict[str, Tensor]:
    """`read_shard`, with the samples that the manifest has there, or the first of them.

    Raises:
        ValueError: it is missing, damaged, or of another manifest: that was lost, or shards were swapped.
    """
    path = shard_path(folder, shard)
    tensors = read_shard(path)
    seeds = tensors["seeds"].tolist()
    expected = manifest.seeds(manifest.shard_range(shard)[: len(seeds)])
    if seeds[: len(expected)] != expected or tensors["ids"].shape[1] != manifest.length:
        raise ValueError(f"pair shard {path} is none of the manifest's; delete it and run ddecode pairs again")
    return tensors


def make_batch(teacher: Teacher, manifest: Manifest, samples: range) -> Tensor:
    """The tokens of some samples, int32 [B,L]."""
    noise_BLC = noise_of(manifest.seeds(samples), (manifest.length, manifest.code_width))
    labels_B = manifest.labels(samples)
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=manifest.precision == "bf16"):
        ids_BL = resolve(teacher, noise_BLC, labels_B, **manifest.recipe, num_steps=manifest.num_steps)
    return ids_BL.to("cpu", TOKEN_DTYPE)


def shard_of(manifest: Manifest, shard: int, ids_NL: Tensor) -> bytes:
    """The bytes of one shard: a function of the teacher, the manifest and the shard's number."""
    samples = manifest.shard_range(shard)
    tensors = {
        "ids": ids_NL,
        "labels": manifest.labels(samples).to(TOKEN_DTYPE),
        "seeds": torch.tensor(manifest.seeds(samples), dtype=torch.int64),
    }
    return save(tensors, metadata={"checksum": checksum(tensors)})


def shard_bytes(manifest: Manifest) -> int:
    """What all shards take on disk, less their headers of a few hundred bytes."""
    ids, label, seed = manifest.length * TOKEN_DTYPE.itemsize, TOKEN_DTYPE.itemsize, torch.int64.itemsize
    return manifest.num * (ids + label + seed)


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_shard(path: str | Path) -> dict[str, Tensor]:
    """ids int32 [N,L], labels int32 [N], seeds int64 [N], checked against the checksum.

    Raises:
        ValueError: the shard is missing or damaged.
    """
    path = as_path("a pair shard", path)
    if not path.is_file():
        raise ValueError(f"pair shard {path} is missing; run ddecode pairs again to make it")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            expected = (file.metadata() or {}).get("checksum")
    except SafetensorError as error:
        raise ValueError(f"pair shard {path} is damaged ({error}); delete it and run ddecode pairs again") from None
    if not has_layout(tensors) or expected != checksum(tensors):
        raise ValueError(f"pair shard {path} is damaged (its checksum is off); delete it and run ddecode pairs again")
    return tensors


def has_layout(tensors: dict[str, Tensor]) -> bool:
    """Whether names, dtypes and shapes are a shard's: the checksum is of the values alone."""
    if {name: t.dtype for name, t in tensors.items()} != DTYPES:
        return False
    samples = tensors["seeds"].shape
    return tensors["labels"].shape == samples == tensors["ids"].shape[:1] and tensors["ids"].dim() == 2


class Pairs:
    """A folder of pairs as a training set; see `ddecode.training.Samples`.

    Args:
        folder: written by `write_pairs`.
        teacher_hash: of the teacher that is to be distilled; None takes any.
        num: the first so many, as before the folder grew; None takes all.

    Raises:
        ValueError: shards are missing or damaged, there are fewer pairs, or another teacher made them.
    """

    def __init__(self, folder: str | Path, *, teacher_hash: str | None = None, num: int | None = None) -> None:
        folder = as_path("a folder of pairs", folder)
        manifest = read_manifest(folder)
        if num is not None and num > manifest.num:
            raise ValueError(f"{folder} has {manifest.num} pairs and should have {num}; make the others again")
        self.manifest = wanted = replace(manifest, num=num or manifest.num)
        if teacher_hash is not None and manifest.teacher_hash != teacher_hash:
            raise ValueError(
                f"{folder} was made by another teacher ({manifest.teacher} {manifest.teacher_hash}, not {teacher_hash})"
            )
        shards = []
        for shard in range(wanted.shards):
            tensors = manifest_shard(folder, manifest, shard)
            whole = {len(each.shard_range(shard)) for each in (manifest, wanted)}  # it may be about to grow
            if len(tensors["ids"]) not in whole:
                raise ValueError(f"pair shard {shard_path(folder, shard)} is incomplete; run ddecode pairs again")
            shards.append(tensors)
        self.ids_NL = torch.cat([s["ids"] for s in shards])[:num]
        self.labels_N = torch.cat([s["labels"] for s in shards])[:num]
        self.seeds_N = torch.cat([s["seeds"] for s in shards])[:num]

    def __len__(self) -> int:
        return len(self.ids_NL)

    @property
    def recipe(self) -> Recipe:
        """How their teacher was guided and filtered."""
        return Recipe(**self.manifest.recipe)

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, C and the number of classes."""
        return self.manifest.length, self.manifest.code_width, self.manifest.num_classes

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """noise fp32 [B,L,C], ids int64 [B,L], labels int64 [B].

        Raises:
            ValueError: an index is of no pair.
        """
        if not isinstance(indices, list) or not indices:
            raise ValueError(f"indices must be a list of whole numbers, got {shown(indices)}")
        for index in indices:
            check_whole("an index of a pair", index, 0, len(self) - 1)
        noise = noise_of(self.seeds_N[indices].tolist(), (self.manifest.length, self.manifest.code_width))
        return noise, self.ids_NL[indices].long(), self.labels_N[indices].long()


class ForcedPairs:
    """Pairs with their teacher's probabilities along the tokens, as a training set.

    The token of a pair is one draw from what its teacher knew at that position; here is all of it, from one pass over
    the finished sequence.

    Args:
        pairs: made by this teacher.
        teacher: frozen.
        precision: of the pass; "bf16" is autocast.
        cache_gib: memory in which probabilities may be kept for the epochs to come; those of further samples are
            computed anew each time.
    """

    def __init__(
        self, pairs: Pairs, teacher: Teacher, *, precision: Literal["no", "bf16"] = "no", cache_gib: float = 0.0
    ) -> None:
        self.pairs, self.teacher, self.precision = pairs, teacher, precision
        self.recipe = pairs.recipe
        bytes_each = 2 * teacher.length * len(teacher.codebook_VC)
        kept = min(len(pairs), int(cache_gib * 2**30) // bytes_each)
        self.cache_NLV = torch.empty(kept, teacher.length, len(teacher.codebook_VC), dtype=torch.float16)
        self.cached_N = torch.zeros(len(pairs), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """noise fp32 [B,L,C], ids int64 [B,L], labels int64 [B], log-probabilities fp16 [B,L,V] under the pairs'
        recipe, -inf for excluded codes."""
        noise_BLC, ids_BL, labels_B = self.pairs.batch(indices)
        index_B, device = torch.tensor(indices), self.teacher.device
        new_B = ~self.cached_N[index_B]
        shape = len(indices), *self.cache_NLV.shape[1:]
        log_probs_BLV = torch.empty(shape, dtype=self.cache_NLV.dtype, device=device)
        log_probs_BLV[~new_B] = self.cache_NLV[index_B[~new_B]].to(device)
        if new_B.any():
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                new_NLV = self.teacher.log_probs(ids_BL[new_B].to(device), labels_B[new_B].to(device), self.recipe)
            log_probs_BLV[new_B] = new_NLV.to(log_probs_BLV.dtype)
            kept_B = new_B & (index_B < len(self.cache_NLV))
            self.cache_NLV[index_B[kept_B]] = log_probs_BLV[kept_B].cpu()
            self.cached_N[index_B[kept_B]] = True
        return noise_BLC, ids_BL, labels_B, log_probs_BLV
