"""A student through whose depth the AR steps go one behind the other.

A teacher goes through all its blocks for each AR step. This student goes through its blocks once and settles the AR
steps on the way (`ddecode.settling_student`): the first step's tokens after few blocks, the next step's a block or two
later, the last step's at the end. Where a step is read the tokens before it are settled, so what the depth cannot hold
is all that is lost.

Positions stand there before their step's turn and read what is settled so far. In VAR that is the picture as it grows.

B batch, L token positions, N tokens of one AR step, M input positions behind the condition, C code width, D model
width.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.settling_student import Mixer, Reading, SettlingStudent
from ddecode.shifted_student import known_tokens
from ddecode.teacher import Teacher
from ddecode.types import Backbone, SteppedBackbone, Tokenizer, step_ranges


class StaggeredStudent(SettlingStudent):
    """Predicts its teacher's probabilities from the tokens before; the exact map makes the tokens within the pass.

    Args:
        backbone: the teacher's own kind, reading AR steps one at a time (`SteppedBackbone`).
        tokenizer: as for every student.
        starts: as for every student; each the end of an AR step.
        exits: for each AR step, the number of blocks after which its tokens are read, up to all for the last. Of two
            with the same number the second sees the first's tokens where they are fed in, and no attention to them:
            for a teacher of more AR steps than the student has blocks.
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
        if len(exits) != len(steps) or exits[0] < 0 or exits[-1] != depth or list(exits) != sorted(exits):
            raise ValueError(
                f"exits must be {len(steps)} numbers of blocks, one for each AR step, none less than the one before, "
                f"the last all {depth}, got {list(exits)}"
            )
        if joins not in (0, *exits) or joins >= depth:
            raise ValueError(f"joins must be 0 or one of the exits before the last block, got {joins}")
        self.ranges = step_ranges(steps)
        """First token and end of each AR step."""
        self.known = known_tokens(steps)
        """By input position behind the condition, the number of tokens it knows in the end."""
        self.exits, self.joins = exits, joins
        self.check_starts(self.starts)
        self.token_maps = nn.ModuleList(nn.Linear(backbone.width, backbone.width, bias=False) for _ in exits[1:])
        self.mixer = nn.Identity() if len(set(exits)) == len(exits) else Mixer(backbone.width)
        """In front of the logits, where blocks are too few for that."""

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

    def end(self, stop: int) -> int:
        """See `SettlingStudent.end`: of the AR step."""
        return self.reach(stop)

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        super().initialize_from(teacher)
        for token_map in self.token_maps:
            assert isinstance(token_map, nn.Linear)
            nn.init.eye_(token_map.weight)

    def walk(
        self, sequence_BLC: Tensor, labels_B: Tensor, start: int, end: int, told_BL: Tensor | None = None
    ) -> Iterator[Reading]:
        """See `SettlingStudent.walk`; a reading is an AR step."""
        backbone, read = self.stepped, self.reader()
        condition = backbone.condition(labels_B)
        known_M = torch.tensor(self.known, device=labels_B.device)
        inputs_BMD = backbone.blank_inputs().expand(len(labels_B), -1, -1) + self.indicator((known_M <= start).long())
        for step, (begin, stop) in enumerate(self.ranges):
            if stop <= start:
                ids_BN = nearest_code(sequence_BLC[:, begin:stop], self.codebook_VC)
                inputs_BMD = add_last(inputs_BMD, backbone.added_inputs(ids_BN, step))

        prefix = condition.prefix_BPD.shape[1]
        first = prefix + len(known_M) - self.length  # of hidden: where the first token is read off
        there = first + end - prefix  # of the inputs: how many take part
        joins = self.joins if end == self.length and start < self.ranges[-1][0] else 0
        now = there - backbone.steps[-1] if joins else there  # of these, how many are there yet
        hidden, done = torch.cat([condition.prefix_BPD, inputs_BMD[:, :now]], 1), 0
        for step, ((begin, stop), exit) in enumerate(zip(self.ranges, self.exits, strict=True)):
            if exit > joins and now < there:
                hidden, now = torch.cat([hidden, inputs_BMD[:, now:there]], 1), there
            hidden = backbone.hidden(hidden, condition, blocks=range(done, exit))
            done = exit
            if begin >= start:
                tokens_N = torch.arange(begin, stop, device=hidden.device)
                logits_BNV = read(self.mixer(hidden[:, first + begin : first + stop]), condition)
                settled_BN = self.settled(sequence_BLC, logits_BNV, tokens_N, told_BL)
                yield Reading(tokens_N=tokens_N, logits_BNV=logits_BNV, ids_BN=settled_BN)
                if stop == end:
                    return
                added_BND = backbone.added_inputs(settled_BN, step)
                if now < there:
                    inputs_BMD = add_last(inputs_BMD, added_BND)
                seen = added_BND.shape[1] - len(known_M) + now  # of those that read them, how many are there
                hidden = add_last(hidden, self.token_maps[step](added_BND[:, :seen]))


def add_last(x_BMD: Tensor, added_BND: Tensor) -> Tensor:
    """x with this added to its last N vectors."""
    return x_BMD + F.pad(added_BND, (0, 0, x_BMD.shape[1] - added_BND.shape[1], 0))
