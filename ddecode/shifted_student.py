"""What three kinds of student share that stand where their teacher does (drafting, wavefront, DD2's): a position sees
only what lies before it, as tokens where these are resolved and as noise where they are not.

B batch, L token positions, M input positions behind the condition, C code width, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.student import Student
from ddecode.teacher import Teacher
from ddecode.types import Backbone, Condition, Tokenizer, step_ranges


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a pass begins with."""

    condition: Condition
    inputs_BND: Tensor
    """The condition's vectors, then those of M positions."""
    first: int
    """The input position where the first token is read off."""
    sequence_BNC: Tensor
    """The codes and noise that the positions see; N of them."""
    ids_BN: Tensor
    """Of the same, the codes' tokens, int64; where there is noise they mean nothing."""
    resolved_BN: Tensor
    """Of the same, bool: whether it is a code."""


class ShiftedStudent(Student):
    """See `ddecode.student.Student`. Its backbone reads as the teacher's own does (`Backbone.mixed_inputs`)."""

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, *, starts: tuple[int, ...]) -> None:
        super().__init__(backbone, tokenizer, starts=starts)
        self.noise_map = nn.Linear(tokenizer.codebook_VC.shape[1], backbone.width)
        self.known = known_tokens(backbone.steps)
        """By input position behind the condition, the number of tokens it knows."""

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        """See `Student.initialize_from`; noise counts for little at first."""
        super().initialize_from(teacher)
        nn.init.normal_(self.noise_map.weight, std=0.02)
        nn.init.zeros_(self.noise_map.bias)

    def opening(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor, stop: int) -> Opening:
        """The inputs of a pass that predicts the tokens before `stop`, or all of its AR step."""
        backbone = self.backbone
        reach = self.reach(min(max(stop, backbone.steps[0] + 1), self.length))
        read = max(begin for begin in (0, *self.known) if begin < reach)
        condition = backbone.condition(labels_B)
        sequence_BNC = sequence_BLC[:, :read]
        resolved_BN = torch.arange(read, device=start_B.device) < start_B[:, None]
        most = min(max(start_B.tolist(), default=0), read)
        ids_BN = F.pad(nearest_code(sequence_BNC[:, :most], self.codebook_VC), (0, read - most))
        inputs = torch.cat([condition.prefix_BPD, self.inputs(sequence_BNC, ids_BN, resolved_BN, start_B)], 1)
        return Opening(
            condition=condition,
            inputs_BND=inputs,
            first=inputs.shape[1] - reach,
            sequence_BNC=sequence_BNC,
            ids_BN=ids_BN,
            resolved_BN=resolved_BN,
        )

    def inputs(self, sequence_BNC: Tensor, ids_BN: Tensor, resolved_BN: Tensor, start_B: Tensor) -> Tensor:
        """What the teacher reads of the resolved tokens, the noise of the others, and which of the two, [B,M,D]."""
        known_M = torch.tensor([k for k in self.known if k <= sequence_BNC.shape[1]], device=start_B.device)
        resolved_BM = known_M <= start_B[:, None]
        tokens_BMD, noise_BMC = self.backbone.mixed_inputs(ids_BN, resolved_BN, sequence_BNC)
        return tokens_BMD + self.noise_inputs(noise_BMC, resolved_BM) + self.indicator(resolved_BM.long())

    def noise_inputs(self, noise_BMC: Tensor, resolved_BM: Tensor) -> Tensor:
        """What positions read of noise, [B,M,D]; `resolved_BM` is where all before them is tokens."""
        return self.noise_map(noise_BMC)


def known_tokens(steps: tuple[int, ...]) -> tuple[int, ...]:
    """By input position behind the condition, the number of tokens before its AR step."""
    return tuple(begin for begin, end in step_ranges(steps)[1:] for _ in range(end - begin))
