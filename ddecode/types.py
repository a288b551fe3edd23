"""The glossary: the protocols a model family implements and the results that models return.

Shape letters, used as suffixes everywhere:
    B batch, L token positions, P condition positions in front of them, N positions of one call, V codes,
    C code width, D model width, H heads, K autoregressive steps.

Positions are counted in tokens. `flow_time` runs from 0 (noise) to 1 (code); `start` is the number of tokens
already resolved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Labels = int | Sequence[int] | Tensor
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a backbone makes of class labels (or captions)."""

    prefix_BPD: Tensor
    """The first P input vectors; the first AR step is read off the last of them."""
    mask_BP: Tensor | None = None
    """bool, False where a prefix position is padding; None means all are real."""
    class_BD: Tensor | None = None
    """The class vector alone, for heads that are modulated by it."""
    modulation: tuple[Tensor, ...] = ()
    """What adaptive layer norms make of the class, each [B,...], computed once for all passes; the family's own."""

    @staticmethod
    def joined(first: "Condition", second: "Condition") -> "Condition":
        """Both batches as one; they share `first`'s mask."""
        both = None
        if first.class_BD is not None and second.class_BD is not None:
            both = torch.cat([first.class_BD, second.class_BD])
        return Condition(
            prefix_BPD=torch.cat([first.prefix_BPD, second.prefix_BPD]),
            mask_BP=None if first.mask_BP is None else first.mask_BP.repeat(2, 1),
            class_BD=both,
            modulation=tuple(torch.cat(pair) for pair in zip(first.modulation, second.modulation, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Both heads of a student, at all L positions."""

    embeddings_BLC: Tensor
    logits_BLV: Tensor
    drafts: tuple[Tensor, ...] = ()
    """Logits [B,N,V] of the first N tokens that a student read off between its blocks."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Images through a tokenizer that is being trained."""

    images_B3HW: Tensor
    """Decoded from the codes, with gradients straight through them to the encoder."""
    ids: Tensor
    """int64, all codes used."""
    targets_NC: Tensor
    """The vectors that were quantised, where codes that nobody uses may move to."""
    code_loss: Tensor
    """Of the codes against the latents, and of the latents against the codes."""


def step_ranges(steps: Sequence[int]) -> list[tuple[int, int]]:
    """First token and end of each AR step."""
    return list(pairwise(accumulate(steps, initial=0)))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """In what attention multiplies: autocast's dtype where one is open, else the weights'."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class KeyValueCache:
    """Keys and values of every layer, allocated once for the longest sequence.

    Args:
        depth: number of layers.
        shape: (B, H, positions, head width).
    """

    def __init__(self, depth: int, shape: tuple[int, int, int, int], *, device: Any, dtype: torch.dtype) -> None:
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(depth)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(depth)]
        self.capacity = shape[2]
        self.length = 0
        """Positions already written by completed passes."""

    def extend(self, layer: int, keys_BHNd: Tensor, values_BHNd: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new positions behind `length`; return all written so far, [B,H,length+N,d]."""
        stop = self.length + keys_BHNd.shape[2]
        assert stop <= self.capacity, "the cache is full"
        self.keys[layer][:, :, self.length : stop] = keys_BHNd
        self.values[layer][:, :, self.length : stop] = values_BHNd
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]


@runtime_checkable
class Backbone(Protocol):
    """A transformer that predicts image tokens; implement this to bring your own AR model.

    A pass reads the P vectors of `condition` followed by the vectors that the tokens make known. The predictions of
    the L tokens stand at the last L positions of a whole pass. Tokens of one AR step never see each other's outcome.

    A method `head_parameters` may name what `logits` works with: in a student that leaves its tokens to the
    noise-to-token map, half precision leaves these in fp32.
    """

    steps: tuple[int, ...]
    """Tokens per AR step; they sum to L."""
    width: int
    depth: int
    vocab_size: int
    num_classes: int
    """Label `num_classes` is the unconditional one."""

    def condition(self, labels: Any) -> Condition:
        """Labels int64 [B] (or captions) to condition vectors."""

    def unconditional(self, labels: Any) -> Any:
        """Labels of the same form and batch that stand for no condition."""

    def null_labels(self, batch: int) -> Any:
        """`batch` labels that stand for no condition."""

    def guidance_weight(self, scale: float, step: int) -> float:
        """w of AR step `step` in `logits = cond + w (cond - uncond)`, for upstream's guidance scale; 0 is off."""

    def token_inputs(self, ids_BN: Tensor, seen: int = 0) -> Tensor:
        """Input vectors [B,M,D] of the positions that N resolved tokens make known, less the first `seen` of them."""

    def mixed_inputs(self, ids_BN: Tensor, resolved_BN: Tensor, noise_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """The same [B,M,D] of the tokens that are resolved, the others counting for nothing; and what each of these
        positions sees of the others' noise, [B,M,C], before any learned map. Only a
        `ShiftedStudent` needs it."""

    def vector_inputs(self, sequence_BLC: Tensor) -> Tensor:
        """Input vectors [B,N,D] of a student's sequence of codes and noise, whole or its first AR steps; only students
        have it."""

    def student_state(self, teacher: Any, codebook_VC: Tensor) -> dict[str, Tensor]:
        """The state that a student of this shape begins with, made of a teacher's backbone; only students have it.

        Raises:
            ValueError: the teacher's weights do not fit.
        """

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` rows of P + L positions."""

    def hidden(
        self,
        inputs_BND: Tensor,
        condition: Condition,
        *,
        cache: KeyValueCache | None = None,
        residuals: Sequence[Tensor] | None = None,
        blocks: range | None = None,
    ) -> Tensor:
        """Hidden states [B,N,D] before the final norm; with `blocks`, those behind these blocks, of those before them.

        With a cache the N vectors stand behind those cached. `residuals`, one [B,N,D] per block, are added inside
        the block, between attention and feed-forward.
        """

    def logits(self, hidden_BND: Tensor, condition: Condition) -> Tensor:
        """Hidden states to fp32 logits [B,N,V]."""


@runtime_checkable
class SteppedBackbone(Backbone, Protocol):
    """A backbone whose inputs are sums over the AR steps whose tokens are known, as VAR's are. Only a
    `StaggeredStudent` needs it."""

    def blank_inputs(self) -> Tensor:
        """Input vectors [1,M,D] of all positions behind the condition, before any token is known."""

    def added_inputs(self, ids_BN: Tensor, step: int) -> Tensor:
        """What the tokens [B,N] of one AR step add to the inputs of those that come later, the last ones of M. All of
        them added to `blank_inputs` make `token_inputs`."""


@runtime_checkable
class Tokenizer(Protocol):
    """Images to tokens and back.

    What makes most of the work of `decode` may be a module `decoder`: half precision and compilation take that one.
    """

    @property
    def codebook_VC(self) -> Tensor:
        """The codebook that `decode` uses, fp32."""

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """fp32 images in [-1,1] to ids int64 [B,L] in teacher order."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Ids int64 [B,L] or embeddings [B,L,C] to fp32 images [B,3,H,W], nominally in [-1,1]."""
