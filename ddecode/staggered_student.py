"""A student through whose depth the AR steps go one behind the other.

A teacher goes through all its blocks for each AR step. This student goes through its blocks once: the first step's
tokens are read off after few of them, mapped from their noise and fed in, the next step's a block or two later, and the
last step's at the end. A step's tokens are settled before the next is read, so the student is an auto-regressive model
of its own, whose steps have a block or two each instead of all: by the chain rule, the cross-entropy against the
teacher's probabilities along the teacher's tokens, less their entropy, is the divergence of all that it emits, and
nothing need be learnt of the map. What the depth cannot hold is all that is lost.

Positions stand there before their step's turn and read what is settled so far. In VAR that is the picture as it grows.

B batch, L token positions, M input positions behind the condition, V codes, C code width, D model width.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.mapped_student import MappedStudent
from ddecode.shifted_student import known_tokens
from ddecode.teacher import Teacher
from ddecode.types import Backbone, Prediction, SteppedBackbone, Tokenizer, step_ranges


class StaggeredStudent(MappedStudent):
    """Predicts its teacher's probabilities from the tokens before; the exact map makes the tokens within the pass.

    Args:
        backbone: the teacher's own kind, reading AR steps one at a time (`SteppedBackbone`).
        tokenizer: as for every student.
        starts: as for every student; each the end of an AR step.
        exits: for each AR step, the number of blocks after which its tokens are read, rising; the last is all.
        joins: number of blocks that the positions of the last AR step leave out, 0 or one of `exits`. No other
            position reads them, and in VAR they are up to half of all. A pass over that step alone leaves out none:
            there it is the teacher's own.
        num_steps: evaluations of the map.

    Raises:
        ValueError: the backbone cannot read AR steps one at a time; exits, joins or starts do not fit it.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        *,
        starts: tuple[int, ...],
        exits: tuple[int, ...],
        joins: int = 0,
        num_steps: int = 16,
    ) -> None:
        if not isinstance(backbone, SteppedBackbone):
            raise ValueError(
                f"a student with exits needs a backbone with blank_inputs and added_inputs, such as VAR's, not "
                f"{type(backbone).__name__}"
            )
        super().__init__(backbone, tokenizer, starts=starts, num_steps=num_steps)
        steps, depth = backbone.steps, backbone.depth
        if len(exits) != len(steps) or exits[0] < 0 or exits[-1] != depth or any(a >= b for a, b in pairwise(exits)):
            raise ValueError(
                f"exits must be {len(steps)} numbers of blocks, one for each AR step, rising to all {depth}, "
                f"got {list(exits)}"
            )
        if joins not in (0, *exits[:-1]):
            raise ValueError(f"joins must be 0 or one of the exits {list(exits[:-1])}, got {joins}")
        self.ranges = step_ranges(steps)
        """First token and end of each AR step."""
        self.known = known_tokens(steps)
        """By input position behind the condition, the number of tokens it knows in the end."""
        self.exits, self.joins = exits, joins
        self.check_starts(self.starts)
        self.token_maps = nn.ModuleList(nn.Linear(backbone.width, backbone.width, bias=False) for _ in exits[1:])

    @property
    def stepped(self) -> SteppedBackbone:
        """Its backbone, as what the constructor found it to be."""
        return cast(SteppedBackbone, self.backbone)

    def check_starts(self, starts: Iterable[int]) -> None:
        """See `Student.check_starts`: only from the end of an AR step."""
        ends = {0, *(end for _, end in self.ranges)}
        if wrong := [start for start in starts if start not in ends]:
            raise ValueError(f"with exits each start must be the end of an AR step, got {wrong[0]}")

    def options(self) -> dict[str, Any]:
        return {"starts": self.starts, "exits": self.exits, "joins": self.joins, "num_steps": self.num_steps}

    def forward(
        self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor, told_BL: Tensor | None = None
    ) -> Prediction:
        """The teacher's logits as predicted, before the map, and the codes expected under them.

        Args:
            told_BL: tokens int64 that stand in for the student's own as they are settled (teacher forcing).
        """
        logits_BLV, _ = self.walk(sequence_BLC, labels_B, start_B, range(self.length), told_BL)
        return Prediction(embeddings_BLC=torch.softmax(logits_BLV, -1) @ self.codebook_VC, logits_BLV=logits_BLV)

    @torch.no_grad()
    def emit(self, sequence_BLC: Tensor, labels_B: Tensor, start: int, stop: int) -> Tensor:
        """The map's codes. The pass ends where the last token asked for is read."""
        start_B = torch.full((len(sequence_BLC),), start, device=self.device)
        logits_BNV, settled_BN = self.walk(sequence_BLC, labels_B, start_B, range(start, stop))
        begin, end = settled_BN.shape[1], self.reach(stop)
        last_BN = self.tokens(sequence_BLC[:, begin:end], logits_BNV[:, begin - end :], self.num_steps)
        ids_BN = torch.cat([settled_BN, last_BN], 1)[:, start:stop]
        return F.embedding(ids_BN, self.codebook_VC)

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        super().initialize_from(teacher)
        for token_map in self.token_maps:
            assert isinstance(token_map, nn.Linear)
            nn.init.eye_(token_map.weight)

    def walk(
        self,
        sequence_BLC: Tensor,
        labels_B: Tensor,
        start_B: Tensor,
        wanted: range,
        told_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass, up to the AR step of the last token wanted.

        Args:
            wanted: tokens; those before it are resolved in all samples.

        Returns:
            Logits fp32 [B,N,V] of the tokens wanted and of the rest of the last one's AR step, and the tokens int64
            [B,N] of all steps before that.
        """
        backbone, read, least, most = self.stepped, self.reader(), int(start_B.min()), int(start_B.max())
        condition = backbone.condition(labels_B)
        known_M = torch.tensor(self.known, device=start_B.device)
        inputs_BMD = backbone.blank_inputs() + self.indicator((known_M <= start_B[:, None]).long())
        for step, (begin, end) in enumerate(self.ranges):
            if end <= most:
                ids_BN = nearest_code(sequence_BLC[:, begin:end], self.codebook_VC)
                inputs_BMD = add_last(inputs_BMD, self.added(ids_BN, step, start_B >= end))

        prefix, reach = condition.prefix_BPD.shape[1], self.reach(wanted.stop)
        first = prefix + len(known_M) - self.length  # of hidden: where the first token is read off
        there = first + reach - prefix  # of the inputs: how many take part
        last = self.ranges[-1][0]
        joins = self.joins if reach == self.length and least < last else 0
        stay = there - backbone.steps[-1] if joins else there  # how many leave no block out
        now = stay if most < last else there
        hidden = torch.cat([condition.prefix_BPD, inputs_BMD[:, :now]], 1)
        settled, logits, done = [nearest_code(sequence_BLC[:, : wanted.start], self.codebook_VC)], [], 0
        for step, ((begin, end), exit) in enumerate(zip(self.ranges, self.exits, strict=True)):
            hidden = backbone.hidden(hidden, condition, blocks=range(done, exit))
            done = exit
            if begin >= wanted.start:
                logits.append(read(hidden[:, first + begin : first + end], condition))
                if end >= wanted.stop:
                    break
                if told_BL is None:
                    with torch.no_grad():
                        settled.append(self.tokens(sequence_BLC[:, begin:end], logits[-1], self.num_steps))
                else:
                    settled.append(told_BL[:, begin:end])
                added_BND = self.added(settled[-1], step, start_B < end)
                if exit <= joins:  # some have yet to join
                    inputs_BMD = add_last(inputs_BMD, added_BND)
                seen = added_BND.shape[1] - len(known_M) + now  # of those that read them, how many are there
                hidden = add_last(hidden, self.token_maps[step](added_BND[:, :seen]))
            if joins and exit == joins:
                joining_BND = inputs_BMD[:, stay:there]
                if now > stay:  # in the samples that begin with the last step they are there already
                    joining_BND = torch.where((start_B < last)[:, None, None], joining_BND, hidden[:, prefix + stay :])
                hidden, now = torch.cat([hidden[:, : prefix + stay], joining_BND], 1), there
        return torch.cat(logits, 1), torch.cat(settled, 1)

    def added(self, ids_BN: Tensor, step: int, counted_B: Tensor) -> Tensor:
        """What an AR step's tokens add to the inputs of those that read them, in the samples that count."""
        return self.stepped.added_inputs(ids_BN, step) * counted_B[:, None, None]


def add_last(x_BMD: Tensor, added_BND: Tensor) -> Tensor:
    """x with this added to its last N vectors."""
    return x_BMD + F.pad(added_BND, (0, 0, x_BMD.shape[1] - added_BND.shape[1], 0))
