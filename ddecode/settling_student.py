"""What two kinds of student share that settle tokens within their depth.

Some tokens are read off after few blocks, mapped from their noise and fed in before the next are read, the last ones
after all blocks. So the student goes through its blocks once, as any one-step student, and is an auto-regressive model
of its own all the same, whose steps have a block or two each instead of all: by the chain rule, the cross-entropy
against the teacher's probabilities along the teacher's tokens, less their entropy, bounds the divergence of all that it
emits, and nothing need be learnt of the map.

B batch, L token positions, N tokens that are read at once, V codes, C code width, D model width.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.arguments import check_logits
from ddecode.linear import Linear
from ddecode.mapped_student import MappedStudent
from ddecode.processes import any_of_all, world
from ddecode.types import Prediction


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Tokens that are read at once."""

    tokens_N: Tensor
    """Their positions, int64, rising."""
    logits_BNV: Tensor
    """fp32."""
    ids_BN: Tensor
    """As settled, int64."""


class SettlingStudent(MappedStudent):
    """See `ddecode.mapped_student.MappedStudent`; the map makes the tokens within the pass."""

    @abstractmethod
    def walk(
        self, sequence_BLC: Tensor, labels_B: Tensor, start: int, end: int, told_BL: Tensor | None = None
    ) -> Iterator[Reading]:
        """One pass over the tokens from `start` to `end`.

        Args:
            told_BL: see `forward`.
        """

    @abstractmethod
    def end(self, stop: int) -> int:
        """Where the pass ends that is taken for the tokens before `stop`."""

    def forward(
        self,
        sequence_BLC: Tensor,
        labels_B: Tensor,
        start_B: Tensor,
        told_BL: Tensor | None = None,
        stop_B: Tensor | None = None,
    ) -> Prediction:
        """The teacher's logits as predicted, before the map, and the codes expected under them.

        Args:
            told_BL: tokens int64 that stand in for the student's own as they are settled (teacher forcing).
            stop_B: ends of the passes; None: all are to the last token. Behind them predictions mean nothing.
        """
        if stop_B is None:
            stop_B = torch.full_like(start_B, self.length)
        logits_BLV = torch.zeros(*sequence_BLC.shape[:2], len(self.codebook_VC), device=self.device)
        for start, stop in self.kinds(start_B, stop_B):
            rows = ((start_B == start) & (stop_B == stop)).nonzero()[:, 0]
            counts = float(len(rows) > 0)
            rows = rows if counts else rows.new_zeros(1)
            told = None if told_BL is None else told_BL[rows]
            read = list(self.walk(sequence_BLC[rows], labels_B[rows], start, stop, told))
            tokens_N = torch.cat([reading.tokens_N for reading in read])
            found_BNV = torch.cat([reading.logits_BNV for reading in read], 1)
            rows_BLV = found_BNV.new_zeros(len(rows), self.length, found_BNV.shape[2])
            rows_BLV = rows_BLV.index_copy(1, tokens_N, found_BNV)
            logits_BLV = logits_BLV.index_add(0, rows, rows_BLV, alpha=counts)
        return Prediction(embeddings_BLC=torch.softmax(logits_BLV, -1) @ self.codebook_VC, logits_BLV=logits_BLV)

    def kinds(self, start_B: Tensor, stop_B: Tensor) -> list[tuple[int, int]]:
        """The passes that these samples need; in training those of all processes, with gradients or without, for where
        weights are sharded all must make a pass."""
        own = set(zip(start_B.tolist(), stop_B.tolist(), strict=True))
        if world() == 1 or not self.training:
            return sorted(own)
        return [kind for kind in self.passes if any_of_all(torch.tensor(kind in own, device=self.device))]

    @torch.no_grad()
    def emit(self, sequence_BLC: Tensor, labels_B: Tensor, start: int, stop: int) -> Tensor:
        """The map's codes."""
        read = list(self.walk(sequence_BLC, labels_B, start, self.end(stop)))
        check_logits(read[-1].logits_BNV)  # what overflows before goes through all that follows
        order = torch.cat([reading.tokens_N for reading in read]).argsort()
        ids_BN = torch.cat([reading.ids_BN for reading in read], 1)[:, order]
        return F.embedding(ids_BN[:, : stop - start], self.codebook_VC)

    def settled(self, sequence_BLC: Tensor, logits_BNV: Tensor, tokens_N: Tensor, told_BL: Tensor | None) -> Tensor:
        """The tokens at these positions, int64 [B,N]: as told, or its own."""
        if told_BL is not None:
            return told_BL[:, tokens_N]
        with torch.no_grad():
            return self.tokens(sequence_BLC[:, tokens_N], logits_BNV, self.num_steps)


class Mixer(nn.Module):
    """A feed-forward block (SwiGLU) that lets a position take up what was added to it, before its logits are read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.gate_and_value = Linear(width, 2 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(self.norm(x)).chunk(2, -1)
        return x + self.out(F.silu(gate) * value)
