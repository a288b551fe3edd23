"""A student that drafts tokens between its blocks.

What a position sees of those before it is their noise, of which their tokens are a complicated function. Between
blocks this student therefore drafts: it reads probabilities off the hidden states so far, maps every position's noise
to a token, and feeds these in as the teacher reads tokens. Each draft is right wherever the tokens before were right in
the last one, as in Jacobi decoding, and all of it is one pass of the network.

B batch, L token positions, M input positions behind the condition, V codes, C code width, D model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.arguments import check_logits
from ddecode.mapped_student import MappedStudent
from ddecode.shifted_student import ShiftedStudent
from ddecode.teacher import Teacher
from ddecode.types import Backbone, Prediction, Tokenizer


class DraftStudent(MappedStudent, ShiftedStudent):
    """Predicts its teacher's probabilities from noise; the exact map makes the tokens.

    Args:
        backbone: the teacher's own kind, reading token ids (`token_inputs`, `mixed_inputs`).
        tokenizer, starts: as for every student.
        drafts: numbers of blocks after which tokens are drafted, rising; may be empty.
        joins: number of blocks that the positions of the last AR step leave out, 0 or one of `drafts`. No other
            position reads them, and in VAR they are up to half of all.
        num_steps: evaluations of the map that makes the tokens; best those of the pairs.
        draft_steps: evaluations of the map at a draft.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        *,
        starts: tuple[int, ...],
        drafts: tuple[int, ...],
        joins: int = 0,
        num_steps: int = 16,
        draft_steps: int = 8,
    ) -> None:
        super().__init__(backbone, tokenizer, starts=starts, num_steps=num_steps)
        if list(drafts) != sorted(set(drafts)) or any(not 0 < after < backbone.depth for after in drafts):
            raise ValueError(f"drafts must rise within 1..{backbone.depth - 1}, got {list(drafts)}")
        if joins not in (0, *drafts):
            raise ValueError(f"joins must be 0 or one of the drafts {list(drafts)}, got {joins}")
        if draft_steps < 1:
            raise ValueError(f"the map needs at least 1 evaluation, got {draft_steps}")
        self.drafts, self.joins, self.draft_steps = drafts, joins, draft_steps
        self.draft_maps = nn.ModuleList(nn.Linear(backbone.width, backbone.width, bias=False) for _ in drafts)

    def options(self) -> dict[str, Any]:
        return {
            "starts": self.starts,
            "drafts": self.drafts,
            "joins": self.joins,
            "num_steps": self.num_steps,
            "draft_steps": self.draft_steps,
        }

    def forward(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor) -> Prediction:
        """The teacher's logits as predicted, before the map, and the codes expected under them."""
        *drafts, logits_BLV = self.stages(sequence_BLC, labels_B, start_B, range(self.length))
        expected_BLC = torch.softmax(logits_BLV, -1) @ self.codebook_VC
        return Prediction(embeddings_BLC=expected_BLC, logits_BLV=logits_BLV, drafts=tuple(drafts))

    @torch.no_grad()
    def emit(self, sequence_BLC: Tensor, labels_B: Tensor, start: int, stop: int) -> Tensor:
        """The map's codes; logits and map only of the positions asked for."""
        start_B = torch.full((len(sequence_BLC),), start, device=self.device)
        logits_BNV = check_logits(self.stages(sequence_BLC, labels_B, start_B, range(start, stop))[-1])
        return F.embedding(self.tokens(sequence_BLC[:, start:stop], logits_BNV, self.num_steps), self.codebook_VC)

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        super().initialize_from(teacher)
        for draft_map in self.draft_maps:
            assert isinstance(draft_map, nn.Linear)
            nn.init.eye_(draft_map.weight)

    def stages(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor, wanted: range) -> list[Tensor]:
        """Logits fp32 [B,N,V]: of each draft, without the last AR step that takes part, which nothing reads; at last of
        the tokens wanted, from the last block."""
        backbone = self.backbone
        opening = self.opening(sequence_BLC, labels_B, start_B, wanted.stop)
        condition, whole, first = opening.condition, opening.inputs_BND, opening.first
        ids_BN, seen = opening.ids_BN, opening.ids_BN.shape[1]
        read = self.reader()
        joins = self.joins if whole.shape[1] - first == self.length else 0
        hidden = whole[:, : first + seen] if joins else whole
        logits, done = [], 0
        for after, draft_map in zip(self.drafts, self.draft_maps, strict=True):
            hidden = backbone.hidden(hidden, condition, blocks=range(done, after))
            logits.append(read(hidden[:, first : first + seen], condition))
            with torch.no_grad():
                drafted_BN = self.tokens(opening.sequence_BNC, logits[-1], self.draft_steps)
                ids_BN = torch.where(opening.resolved_BN, ids_BN, drafted_BN)
            if after == joins:
                hidden = torch.cat([hidden, whole[:, first + seen :]], 1)
            known_BMD = backbone.token_inputs(ids_BN)
            fed_BMD = draft_map(known_BMD[:, : known_BMD.shape[1] - whole.shape[1] + hidden.shape[1]])
            hidden = hidden + F.pad(fed_BMD, (0, 0, hidden.shape[1] - fed_BMD.shape[1], 0))
            done = after
        hidden = backbone.hidden(hidden, condition, blocks=range(done, backbone.depth))
        wanted_BND = hidden[:, first + wanted.start : first + wanted.stop]
        return [*logits, read(wanted_BND, condition)]
