"""Tiny random models for tests: a LlamaGen family member of 16 tokens, a VAR of 14, a toy of several tokens a step.

B batch, L token positions, N positions of one call, V codes, C code width, D model width.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddecode.checkpoint import family_module, save_model, zoo_folder
from ddecode.dd2_student import DD2Student
from ddecode.draft_student import DraftStudent
from ddecode.pipeline import DistilledPipeline
from ddecode.staggered_student import StaggeredStudent
from ddecode.student import DD1Student, Student
from ddecode.teacher import Recipe, Teacher
from ddecode.types import Condition, KeyValueCache
from ddecode.wavefront_student import WavefrontStudent
from third_party_loaders import llamagen, var

TOKENIZER = {
    "vocab_size": 32, "code_width": 8, "channels": 32, "channel_mult": [1, 1], "res_blocks": 1, "z_channels": 32,
}  # fmt: skip
BACKBONE = {"vocab_size": 32, "width": 32, "depth": 2, "heads": 2, "tokens": 16, "num_classes": 4}
RECIPE = Recipe(guidance_scale=1.5, top_k=8)
L, C, V = 16, 8, 32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scramble(module: nn.Module, seed: int) -> None:
    """Weights that make every part matter: a fresh transformer's output head would be zero."""
    g = seeded(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=g)
        if parameter.dim() == 1:
            parameter.data = noise / 10 if name.endswith("bias") else 1 + noise / 10
        elif "embed" in name or "table" in name:
            parameter.data = noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
        if name.endswith("output.weight"):
            parameter.data *= 2


def make_tokenizer(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = llamagen.build_tokenizer(llamagen.TokenizerConfig(**TOKENIZER), None)
    return tokenizer.requires_grad_(False)


def make_teacher(seed: int = 0, recipe: Recipe = RECIPE, **sizes: Any) -> Teacher:
    with torch.random.fork_rng():
        teacher = llamagen.build_teacher(
            llamagen.BackboneConfig(**BACKBONE | sizes), make_tokenizer(seed), None, recipe
        )
    scramble(teacher.backbone, seed + 1)
    return teacher


def make_student(
    teacher: Teacher, *, seed: int = 0, starts: tuple[int, ...] = (0, 4), split: int = L, depth: int | None = None
) -> DD1Student:
    with torch.random.fork_rng():
        student = llamagen.build_student(
            llamagen.student_config(teacher, depth), teacher.tokenizer, None, starts=starts, split=split
        )
    scramble(student, seed + 2)
    assert isinstance(student, DD1Student)
    return student


def make_draft_student(
    teacher: Teacher,
    *,
    seed: int = 0,
    starts: tuple[int, ...] = (0, 4),
    drafts: tuple[int, ...] = (1,),
    joins: int = 0,
    depth: int | None = None,
) -> DraftStudent:
    """Of either family."""
    family = family_module(teacher.family)
    with torch.random.fork_rng():
        student = family.build_student(
            family.student_config(teacher, depth, shifted=True), teacher.tokenizer, None,
            starts=starts, drafts=drafts, joins=joins, num_steps=8, draft_steps=4,
        )  # fmt: skip
    (scramble if teacher.family == "llamagen" else scramble_var)(student, seed + 2)
    assert isinstance(student, DraftStudent)
    return student


def make_staggered_student(
    teacher: Teacher,
    *,
    seed: int = 0,
    starts: tuple[int, ...] = (0, 5),
    exits: tuple[int, ...] = (0, 1, 2),
    joins: int = 0,
) -> StaggeredStudent:
    """Of VAR."""
    with torch.random.fork_rng():
        student = var.build_student(
            var.student_config(teacher, None, shifted=True), teacher.tokenizer, None,
            starts=starts, exits=exits, joins=joins, num_steps=8,
        )  # fmt: skip
    scramble_var(student, seed + 2)
    assert isinstance(student, StaggeredStudent)
    return student


def make_wavefront_student(
    teacher: Teacher, *, seed: int = 0, starts: tuple[int, ...] = (0, 8), wavefront: int = 2
) -> WavefrontStudent:
    """Of LlamaGen."""
    with torch.random.fork_rng():
        student = llamagen.build_student(
            llamagen.student_config(teacher, None, shifted=True), teacher.tokenizer, None,
            starts=starts, wavefront=wavefront, num_steps=8,
        )  # fmt: skip
    scramble(student, seed + 2)
    assert isinstance(student, WavefrontStudent)
    return student


def random_noise(length: int, seed: int = 0) -> Tensor:
    """Of three samples."""
    return torch.randn(3, length, C, generator=seeded(seed))


def random_ids(length: int, seed: int = 1) -> Tensor:
    """The same of tokens."""
    return torch.randint(V, (3, length), generator=seeded(seed))


def partly(student: Student, noise_BLC: Tensor, start: int) -> Tensor:
    """A sequence of random tokens before `start`, and this noise from there on."""
    codes_BNC = student.codebook_VC[random_ids(student.length)[:, :start]]
    return torch.cat([codes_BNC, noise_BLC[:, start:]], 1)


def all_at(place: int) -> Tensor:
    """The same place in all three."""
    return torch.full((3,), place)


def make_dd2_student(
    teacher: Teacher, *, seed: int = 0, starts: tuple[int, ...] = (0, 4), noise_level: float = 1.0
) -> DD2Student:
    """Of either family."""
    family = family_module(teacher.family)
    with torch.random.fork_rng():
        student = family.build_student(
            family.student_config(teacher, None, shifted=True),
            teacher.tokenizer,
            None,
            starts=starts,
            head_depth=1,
            noise_level=noise_level,
        )
    (scramble if teacher.family == "llamagen" else scramble_var)(student, seed + 2)
    assert isinstance(student, DD2Student)
    return student


def make_pipeline(**student_options: Any) -> DistilledPipeline:
    teacher = make_teacher()
    return DistilledPipeline(
        tokenizer=teacher.tokenizer, teacher=teacher, student=make_student(teacher, **student_options)
    )


def save_tiny(folder: Path, pipe: DistilledPipeline, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder, of either family."""
    teacher, student = pipe.teacher, pipe.student
    config = {
        "family": teacher.family,
        "features": "fashion-eval",
        "tokenizer": pipe.tokenizer.config,
        "teacher": {"backbone": teacher.backbone.config, "recipe": teacher.recipe},
    }
    parts = {"tokenizer": pipe.tokenizer, "teacher": teacher.backbone}
    if student is not None:
        config["student"] = {"backbone": student.backbone.config, **student.options()}
        parts["student"] = student
    save_model(folder, config, parts, dtype=dtype)
    return folder


def distill_recipe(model: Path) -> dict[str, Any]:
    """A distillation of a few steps, as `read_config` takes it."""
    return {
        "teacher": str(model),
        "pairs": {"num": 20, "seed": 3, "batch": 5, "shard_size": 8, "num_steps": 8},
        "student": {"starts": [0, 4], "split": 10},
        "objective": {"logits": 1.0, "embeddings": 0.5, "features": str(zoo_folder() / "features/fashion-perceptual")},
        "training": {
            "steps": 6, "batch": 4, "lr": 1.0e-3, "warmup_steps": 2,
            "log_every": 1, "save_every": 2, "preview_every": 3,
        },
    }  # fmt: skip


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class ScaleBackbone(nn.Module):
    """A `Backbone` of steps of several tokens: every position sees the mean of all steps up to its own.

    The vectors of step k + 1 are made of the mean of all tokens of the steps before it.
    """

    steps = (1, 3, 4)
    width, depth, vocab_size, num_classes = 6, 1, 12, 3

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = seeded(seed)
        self.labels = nn.Parameter(torch.randn(self.num_classes + 1, self.width, generator=g))
        self.table = nn.Parameter(torch.randn(self.vocab_size, self.width, generator=g))
        self.places = nn.Parameter(torch.randn(sum(self.steps), self.width, generator=g))
        self.head = nn.Parameter(2 * torch.randn(self.width, self.vocab_size, generator=g))
        self.step_of_place = torch.tensor([k for k, n in enumerate(self.steps) for _ in range(n)])

    def condition(self, labels: Tensor) -> Condition:
        return Condition(prefix_BPD=self.labels[labels][:, None])

    def unconditional(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.num_classes)

    def null_labels(self, batch: int) -> Tensor:
        return torch.full((batch,), self.num_classes)

    def guidance_weight(self, scale: float, step: int) -> float:
        return scale * step / (len(self.steps) - 1)

    def token_inputs(self, ids_BN: Tensor, seen: int = 0) -> Tensor:
        parts, done = [], 0
        for count, following in pairwise(self.steps):
            done += count
            if done <= ids_BN.shape[1]:
                parts.append(self.table[ids_BN[:, :done]].mean(1, keepdim=True).expand(-1, following, -1))
        return torch.cat(parts, 1)[:, seen:]

    def vector_inputs(self, sequence_BLC: Tensor) -> Tensor:
        raise NotImplementedError

    def mixed_inputs(self, ids_BN: Tensor, resolved_BN: Tensor, noise_BNC: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def student_state(self, teacher: Any, codebook_VC: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def new_cache(self, batch: int) -> KeyValueCache:
        shape = (batch, 1, sum(self.steps), self.width)
        return KeyValueCache(1, shape, device="cpu", dtype=torch.float32)

    def hidden(
        self, inputs_BND: Tensor, condition: Any, *, cache: KeyValueCache | None = None, residuals: Any = None
    ) -> Tensor:
        seen = 0 if cache is None else cache.length
        stop = seen + inputs_BND.shape[1]
        values = inputs_BND
        if cache is not None:
            values = cache.extend(0, inputs_BND[:, None], inputs_BND[:, None])[1][:, 0]
            cache.length = stop
        visible = self.step_of_place[seen:stop, None] >= self.step_of_place[None, :stop]
        mean = (visible.float() / visible.sum(1, keepdim=True)) @ values
        return torch.tanh(mean + self.places[seen:stop])

    def logits(self, hidden_BND: Tensor, condition: Any) -> Tensor:
        return hidden_BND @ self.head


class ScaleTokenizer:
    """A codebook, no images."""

    def __init__(self, seed: int) -> None:
        self.codebook_VC = torch.randn(ScaleBackbone.vocab_size, 4, generator=seeded(seed))


def make_scale_teacher(seed: int = 0) -> Teacher:
    return Teacher(ScaleBackbone(seed), ScaleTokenizer(seed), family="toy")


VAR_TOKENIZER = {
    "vocab_size": 32, "code_width": 8, "channels": 32, "channel_mult": (1, 1), "res_blocks": 1, "recorded_scales": 3,
}  # fmt: skip
VAR_BACKBONE = {"vocab_size": 32, "code_width": 8, "width": 16, "depth": 2, "heads": 2, "num_classes": 4}
VAR_SCALES = (1, 2, 3)


def scramble_var(module: nn.Module, seed: int) -> None:
    """`scramble`, and the parts that would stay small made to matter."""
    scramble(module, seed)
    small = ("class_emb.weight", "pos_start", "pos_1LC", "ada_gss", "indicator.weight", "head.weight")
    for name, parameter in module.named_parameters():
        if name.endswith(small):
            parameter.data *= 4


def make_var_tokenizer(seed: int = 0, patch_nums: tuple[int, ...] = VAR_SCALES, **sizes: Any) -> nn.Module:
    config = var.TokenizerConfig(**VAR_TOKENIZER | {"patch_nums": patch_nums} | sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = var.build_tokenizer(config, None)
    return tokenizer.requires_grad_(False)


def make_var_teacher(
    seed: int = 0, recipe: Recipe = RECIPE, patch_nums: tuple[int, ...] = VAR_SCALES, **sizes: Any
) -> Teacher:
    config = var.BackboneConfig(**VAR_BACKBONE | {"patch_nums": patch_nums} | sizes)
    with torch.random.fork_rng():
        teacher = var.build_teacher(config, make_var_tokenizer(seed, patch_nums), None, recipe)
    scramble_var(teacher.backbone, seed + 1)
    return teacher


def make_var_student(
    teacher: Teacher, *, seed: int = 0, starts: tuple[int, ...] = (0, 5), split: int = 5, depth: int | None = None
) -> Student:
    with torch.random.fork_rng():
        student = var.build_student(
            var.student_config(teacher, depth), teacher.tokenizer, None, starts=starts, split=split
        )
    scramble_var(student, seed + 2)
    return student
