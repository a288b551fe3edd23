"""Upstream's states and ours: one adapter for each kind, and the names of DD1 students."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ddecode.dd2_student import DD2Student
from ddecode.draft_student import DraftStudent
from ddecode.staggered_student import StaggeredStudent
from ddecode.student import DD1Student, Student
from ddecode.types import Backbone, Tokenizer
from ddecode.wavefront_student import WavefrontStudent
from third_party_loaders.state import StateOrPath, check_names, file_name, meta_module, read_state

STUDENT_NAMES = {
    "layerwise_n_d_embed.": "indicator_maps.",
    "n_d_embed.": "indicator.",
    "final_layer_conti.": "continuous_head.",
    "": "backbone.",
}
"""Beginnings of upstream's names of a DD1 student's parameters, and of ours in a `Student`."""
STUDENTS: dict[str, Callable[..., Student]] = {
    "drafts": DraftStudent,
    "exits": StaggeredStudent,
    "wavefront": WavefrontStudent,
    "head_depth": DD2Student,
}
"""Kinds of student but DD1's, by an option that only that kind has."""


def is_student(state: Mapping[str, Tensor]) -> bool:
    """Whether an upstream state holds what DD1 adds to a transformer."""
    added = tuple(theirs for theirs in STUDENT_NAMES if theirs)
    return any(name.startswith(added) for name in state)


def own_student_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's DD1 state under the names of a `Student`."""
    own = {}
    for name, tensor in state.items():
        theirs = next(beginning for beginning in STUDENT_NAMES if name.startswith(beginning))
        own[STUDENT_NAMES[theirs] + name.removeprefix(theirs)] = tensor
    return own


def upstream_student_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `own_student_state`.

    Raises:
        ValueError: a name is none of a student's.
    """
    upstream = {}
    for name, tensor in state.items():
        theirs = next((beginning for beginning, ours in STUDENT_NAMES.items() if name.startswith(ours)), None)
        if theirs is None:
            raise ValueError(f"{name} is no parameter of a student")
        upstream[theirs + name.removeprefix(STUDENT_NAMES[theirs])] = tensor
    return upstream


def new_student(backbone: Backbone, tokenizer: Tokenizer, *, layerwise: bool, **options: Any) -> Student:
    """A student of the kind whose options these are."""
    for option, kind in STUDENTS.items():
        if option in options:
            return kind(backbone, tokenizer, **options)
    return DD1Student(backbone, tokenizer, layerwise=layerwise, **options)


def no_buffers(config: Any) -> dict[str, Tensor]:
    return {}


def no_sizes(file_name: str) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One kind of upstream's states: what it is called, how it is sized, and its names there and here."""

    title: str
    """For people."""
    part: Literal["tokenizer", "teacher", "student"]
    labels: str = ""
    """Upstream's table of classes; its last row is the unconditional one."""
    preferred: tuple[str, ...] = ()
    """Wrappers to look into first, where a file holds several states."""
    optional: str = ""
    """A pattern of upstream's names that a state may lack or have: constants and derived buffers."""
    config: Callable[..., Any]
    """Sizes from an upstream state and what it does not tell."""
    told: Callable[[str], dict[str, Any]] = no_sizes
    """What the name of a published file tells of sizes that the state does not."""
    blank: Callable[[Any], nn.Module]
    """A module of these sizes; called on the meta device."""
    rename: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    """An upstream state of these sizes under our names, optional ones put in or left out."""
    restore: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """The inverse of `rename`, without derived buffers."""
    derived: Callable[[Any], dict[str, Tensor]] = no_buffers
    """Buffers of upstream's that follow from the sizes and are part of its states."""

    def is_optional(self, name: str) -> bool:
        return re.fullmatch(self.optional, name) is not None

    def own(self, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """An upstream state under our names, tensors as they are.

        Raises:
            ValueError: keys are missing, extra or misshapen; upstream's names are given.
        """
        target = self.restore(meta_module(lambda: self.blank(config)).state_dict())
        required = {n: t for n, t in target.items() if n in state or not self.is_optional(n)}
        given = {n: t for n, t in state.items() if n in target or not self.is_optional(n)}
        check_names(required, given, self.title)
        return self.rename(state, config)

    def untold(self, source: StateOrPath, given: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes that the state itself does not tell: as given, where that is not None, or else as its file is named."""
        return self.told(file_name(source)) | {name: value for name, value in given.items() if value is not None}

    def read(self, source: StateOrPath, **sizes: Any) -> tuple[Any, dict[str, Tensor]]:
        """The sizes and, under our names, the tensors of an upstream state or file; `sizes` are those it does not tell,
        see `untold`.

        Raises:
            ValueError: it cannot be read, or see `own`.
        """
        state = read_state(source, self.preferred)
        config = self.config(state, **self.untold(source, sizes))
        return config, self.own(state, config)

    def upstream(self, own: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Our state under upstream's names, with its derived buffers, tensors as they are.

        Raises:
            ValueError: keys are missing, extra or misshapen.
        """
        check_names(meta_module(lambda: self.blank(config)).state_dict(), own, self.title)
        return self.restore(own) | self.derived(config)


def encoder_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`channels`, `channel_mult` and `res_blocks` of a `vqgan.Encoder`, from a tokenizer's state under our names.

    Raises:
        ValueError: it holds no such encoder.
    """
    channels, *_ = shape_of(state, "encoder.conv_in.weight", 4)
    levels = count_of(state, "encoder.conv_blocks.")
    widths = [shape_of(state, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in range(levels)]
    blocks = count_of(state, "encoder.conv_blocks.0.res.")
    return {"channels": channels, "channel_mult": tuple(w // channels for w in widths), "res_blocks": blocks}


def count_of(state: Mapping[str, Tensor], beginning: str) -> int:
    """How many parts `{beginning}0.`, `{beginning}1.`, ... a state has.

    Raises:
        ValueError: there is none, or their numbers have a gap: one made-up number could ask for any amount of memory.
    """
    found = {name.removeprefix(beginning).partition(".")[0] for name in state if name.startswith(beginning)}
    if not found or found != set(map(str, range(len(found)))):
        raise ValueError(f"{beginning}N must be numbered 0, 1, 2, ... without a gap")
    return len(found)


def shape_of(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from.

    Raises:
        ValueError: it is missing, empty or has another number of dimensions.
    """
    if name not in state:
        raise ValueError(f"missing {name}")
    if state[name].dim() != dimensions or not state[name].numel():
        raise ValueError(f"misshapen {name} is {tuple(state[name].shape)}, expected {dimensions} dimensions, none 0")
    return tuple(state[name].shape)
