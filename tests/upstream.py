"""Random states as upstream names and lays them out, of the tiny models."""

from typing import Any

import torch
from tiny import VAR_SCALES, L, make_student, make_teacher, make_var_student, make_var_teacher, seeded
from torch import Tensor

from ddecode.conversion import Options
from third_party_loaders import llamagen, var

State = dict[str, Tensor]
OPTIONS = {"llamagen": Options(n_head=2, block_size=L), "var": Options(patch_nums=VAR_SCALES)}
"""By family, what its states do not tell."""
OPTIONAL = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "codebook_used")
"""Ends of names that a state may lack."""


def random_like(state: State, seed: int) -> State:
    """Other weights of the same names and shapes; constants and derived buffers stay."""
    g = seeded(seed)
    return {n: t if n.endswith(OPTIONAL) else torch.randn(t.shape, generator=g) for n, t in sorted(state.items())}


def make_states() -> dict[str, State]:
    """By kind, complete states in upstream's layout."""
    made: dict[str, State] = {}
    teachers: dict[str, Any] = {"llamagen": make_teacher(seed=3), "var": make_var_teacher(seed=3)}
    for family, teacher in teachers.items():
        module: Any = {"llamagen": llamagen, "var": var}[family]
        student = make_student(teacher) if family == "llamagen" else make_var_student(teacher)
        parts = {"": teacher.backbone, "dd1-": student, "-tokenizer": teacher.tokenizer}
        for seed, (mark, part) in enumerate(parts.items()):
            kind = mark + family if mark != "-tokenizer" else family + mark
            sizes = part.backbone.config if kind.startswith("dd1") else part.config
            upstream = module.ADAPTERS[kind].upstream(part.state_dict(), sizes)
            made[kind] = random_like(upstream, seed)
    return made
