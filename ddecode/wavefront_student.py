"""A student through whose depth a raster of tokens goes as a wavefront.

A teacher that writes one token after the other goes through all its blocks for each. This student goes through its
blocks once and settles tokens on the way (`ddecode.settling_student`). A raster has far more tokens than a network has
blocks, but those of one diagonal, `column + slope row`, hardly depend on each other once the diagonals before are
known: with slope 2 a token's left, upper and upper right neighbours all lie there. So diagonals are read one behind the
other, several after each block. A settled token is added at once to those whose neighbour it is, and reaches all others
by attention in the blocks to come. Of tokens before it in the raster that are not settled when it is read, a position
sees the noise. What is lost is what the depth cannot hold, and what tokens of one diagonal know of each other that
their noise does not tell.

B batch, L token positions, N tokens of one diagonal, S of them that others read, R their readers, V codes, D model
width, X what a token adds to all its readers: D for each offset.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.linear import Linear
from ddecode.settling_student import Mixer, Reading, SettlingStudent
from ddecode.shifted_student import ShiftedStudent
from ddecode.teacher import Teacher
from ddecode.types import Backbone, Tokenizer

LARGEST_TABLE = 1 << 22
"""Numbers in a table of what each code adds: 16 MiB."""


class WavefrontStudent(SettlingStudent, ShiftedStudent):
    """Predicts its teacher's probabilities from the tokens before; the exact map makes the tokens within the pass.

    Args:
        backbone: the teacher's own kind, reading token ids; its tokens are a square in raster order, one an AR step.
        tokenizer, starts: as for every student.
        wavefront: slope of the diagonals, 1 to the square's side, where each token is a diagonal of its own. Of less
            slope there are fewer, which is faster, and each token knows less of the row above.
        num_steps: evaluations of the map.

    Raises:
        ValueError: the tokens are no such square, or the slope does not fit it.
    """

    def __init__(
        self, backbone: Backbone, tokenizer: Tokenizer, *, starts: tuple[int, ...], wavefront: int, num_steps: int = 16
    ) -> None:
        super().__init__(backbone, tokenizer, starts=starts, num_steps=num_steps)
        self.side = round(self.length**0.5)
        if self.side**2 != self.length or any(tokens != 1 for tokens in backbone.steps):
            raise ValueError(
                f"a wavefront needs a teacher whose tokens are a square in raster order, one an AR step; this one's "
                f"AR steps have {', '.join(map(str, backbone.steps[:4]))}... tokens"
            )
        if not 1 <= wavefront <= self.side:
            raise ValueError(f"the wavefront's slope must lie in 1..{self.side}, got {wavefront}")
        self.wavefront = wavefront
        self.offsets = (1, self.side - 1, self.side)
        """From a token to those that read it at once: the next one, and the two below and to the left of it."""
        self._schedules: dict[tuple[int, int, torch.device], list[Diagonal]] = {}
        self._table: tuple[list[tuple[int, int]], Tensor | None] = [], None
        width = backbone.width
        self.token_map = Linear(width, len(self.offsets) * width, bias=False)
        """Of what a settled token adds to each of its readers."""
        self.gains = nn.ParameterList(torch.ones(width) for _ in range(backbone.depth + 1))
        """By the number of blocks before: of the same."""
        self.mixer = Mixer(width)
        """In front of the logits."""

    @property
    def passes(self) -> list[tuple[int, int]]:
        """See `Student.passes`: from each start to each later one and to the end."""
        ends = [*self.starts[1:], self.length]
        return [(start, end) for start in self.starts for end in ends if end > start]

    def options(self) -> dict[str, Any]:
        return {"starts": self.starts, "wavefront": self.wavefront, "num_steps": self.num_steps}

    def diagonals(self, start: int, end: int) -> list[tuple[list[int], int]]:
        """The tokens from `start` to `end` diagonal by diagonal, and after how many blocks each is read.

        They are spread evenly over the depth. Only the first token of all needs no block: it follows from the
        condition.
        """
        diagonals: dict[int, list[int]] = {}
        for token in range(start, end):
            row, column = divmod(token, self.side)
            diagonals.setdefault(column + self.wavefront * row, []).append(token)
        ordered, depth = [diagonals[place] for place in sorted(diagonals)], self.backbone.depth
        early, late = (ordered[:1], ordered[1:]) if start == 0 else ([], ordered)
        spread = [(tokens, -(-(i + 1) * depth // len(late))) for i, tokens in enumerate(late)]
        return [(tokens, 0) for tokens in early] + spread

    def end(self, stop: int) -> int:
        """See `SettlingStudent.end`: of the shortest pass that training knew and that reaches so far."""
        return next(end for end in (*self.starts, self.length) if end >= stop)

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        super().initialize_from(teacher)
        nn.init.zeros_(self.token_map.weight)
        nn.init.eye_(self.token_map.weight[: self.backbone.width])

    @torch.no_grad()
    def table(self) -> Tensor | None:
        """What each code adds to its readers, [V,X], kept for as long as the weights are the same: diagonals are small,
        and to read `token_map` for each takes longer than to work with it.

        None in training, where it would be large, and where a token's input vector is not the same at all positions.
        """
        weights = list(self.parameters())
        V, X = len(self.codebook_VC), len(self.token_map.weight)
        if self.training or V * X > LARGEST_TABLE or any(weight.is_inference() for weight in weights):
            return None
        key = [(weight.data_ptr(), weight._version) for weight in weights]
        if self._table[0] != key:
            codes_V = torch.arange(V, device=self.device)
            with torch.autocast(self.device.type, enabled=False):
                one_LD = self.backbone.token_inputs(codes_V.new_zeros(1, self.length))[0]
                alike = bool((one_LD == one_LD[:1]).all())
                table_VX = self.token_map(self.backbone.token_inputs(codes_V[:, None]))[:, 0] if alike else None
            self._table = key, table_VX
        return self._table[1]

    def walk(
        self, sequence_BLC: Tensor, labels_B: Tensor, start: int, end: int, told_BL: Tensor | None = None
    ) -> Iterator[Reading]:
        """See `SettlingStudent.walk`; a reading is a diagonal."""
        table_VX = None if torch.is_grad_enabled() else self.table()
        backbone, read = self.backbone, self.reader()
        opening = self.opening(sequence_BLC, labels_B, torch.full_like(labels_B, start), end)
        condition, hidden, first, ids_BN = opening.condition, opening.inputs_BND, opening.first, opening.ids_BN
        done = 0
        for diagonal in self.schedule(start, end):
            tokens_N, exit = diagonal.tokens_N, diagonal.exit
            if exit > done:
                hidden = backbone.hidden(hidden, condition, blocks=range(done, exit))
                done = exit
            logits_BNV = read(self.mixer(hidden[:, first + tokens_N]), condition)
            settled_BN = self.settled(sequence_BLC, logits_BNV, tokens_N, told_BL)
            yield Reading(tokens_N=tokens_N, logits_BNV=logits_BNV, ids_BN=settled_BN)
            senders_S = diagonal.senders_S
            if not len(senders_S):
                continue
            sent_BS = settled_BN[:, : len(senders_S)]
            if table_VX is None:
                ids_BN = ids_BN.index_copy(1, senders_S, sent_BS)
                added_BSX = self.token_map(backbone.token_inputs(ids_BN)[:, senders_S])
            else:
                added_BSX = F.embedding(sent_BS, table_VX)
            added_BRD = added_BSX.unflatten(-1, (len(self.offsets), -1)).flatten(1, 2)[:, diagonal.sources_R]
            added_BRD = (added_BRD * self.gains[exit]).to(hidden.dtype)
            hidden = hidden.index_add(1, first + diagonal.readers_R, added_BRD)

    def schedule(self, start: int, end: int) -> list["Diagonal"]:
        """The diagonals of a pass, worked out at its first time."""
        key = start, end, self.device
        if key not in self._schedules:
            self._schedules[key] = [self.diagonal(tokens, exit, end) for tokens, exit in self.diagonals(start, end)]
        return self._schedules[key]

    def diagonal(self, tokens: list[int], exit: int, end: int) -> "Diagonal":
        senders = [token for token in tokens if token < end - 1]
        sources, readers = [], []
        for i, token in enumerate(senders):
            for k, offset in enumerate(self.offsets):
                reader = token + offset
                # the next token in the raster may stand in the next row; those below do not reach around the edge
                if reader < end and (offset == 1 or abs(reader % self.side - token % self.side) <= 1):
                    sources.append(i * len(self.offsets) + k)
                    readers.append(reader)
        lists = (tokens, senders, sources, readers)
        return Diagonal(exit, *(torch.tensor(some, dtype=torch.int64, device=self.device) for some in lists))


@dataclass(frozen=True)
class Diagonal:
    """Tokens that are read at once."""

    exit: int
    """Number of blocks before."""
    tokens_N: Tensor
    """Their positions, int64, rising."""
    senders_S: Tensor
    """Of these, all but the pass's last token, which nobody reads."""
    sources_R: Tensor
    """Which of what the senders add, S by offsets, each reader takes; int64."""
    readers_R: Tensor
    """The tokens that read it; int64."""
