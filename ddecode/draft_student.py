"""A student that leaves the noise-to-token map to its formula, and drafts tokens between its blocks.

DD1's student must learn two things at once: which tokens its teacher would find likely, and how each position's noise
picks one of them. The second is known exactly (`ddecode.flow`). So this student stands where its teacher stands: a
position sees only what lies before it, predicts the teacher's probabilities, and the map turns them and the
position's own noise into the token. Trained by cross-entropy on pairs, its best prediction is the teacher's
probability given the noise before a position, and its best tokens keep the teacher's variance.

What it sees of the positions before it is their noise, of which their tokens are a complicated function. Between
blocks it therefore drafts: it reads probabilities off the hidden states so far, maps every position's noise to a
token, and feeds these in as the teacher reads tokens. Each draft is right wherever the tokens before were right in
the last one, as in Jacobi decoding, and all of it is one pass of the network.

B batch, L token positions, M input positions behind the condition, V codes, C code width, D model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.flow import FlowGrid, flow_grid, noise_to_tokens
from ddecode.shifted_student import ShiftedStudent
from ddecode.student import straight_through
from ddecode.teacher import Teacher
from ddecode.types import Backbone, Labels, Prediction, Tokenizer


class DraftStudent(ShiftedStudent):
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
        super().__init__(backbone, tokenizer, starts=starts)
        if list(drafts) != sorted(set(drafts)) or any(not 0 < after < backbone.depth for after in drafts):
            raise ValueError(f"drafts must rise within 1..{backbone.depth - 1}, got {list(drafts)}")
        if joins not in (0, *drafts):
            raise ValueError(f"joins must be 0 or one of the drafts {list(drafts)}, got {joins}")
        if min(num_steps, draft_steps) < 1:
            raise ValueError(f"the map needs at least 1 evaluation, got {num_steps} and {draft_steps}")
        self.drafts, self.joins, self.num_steps, self.draft_steps = drafts, joins, num_steps, draft_steps
        self.draft_maps = nn.ModuleList(nn.Linear(backbone.width, backbone.width, bias=False) for _ in drafts)
        self._grids: dict[int, FlowGrid] = {}

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
    def predict(self, sequence_BLC: Tensor, class_labels: Labels, start: int | Tensor = 0) -> Prediction:
        """See `Student.predict`. Here the embeddings are the emitted codes, and the logits those at the end of the
        map, so that their argmax is the emitted token."""
        prediction = super().predict(sequence_BLC, class_labels, start)
        noise_BLC, logits_BLV = sequence_BLC.to(self.device), prediction.logits_BLV
        ids_BL = self.tokens(noise_BLC, logits_BLV, self.num_steps)
        codes_BLC = F.embedding(ids_BL, self.codebook_VC)
        scores_BLV = bridge_scores(noise_BLC, codes_BLC, logits_BLV, self.codebook_VC, self.grid(self.num_steps).s[-1])
        return Prediction(embeddings_BLC=codes_BLC, logits_BLV=scores_BLV)

    def emitted(self, prediction: Prediction, sequence_BLC: Tensor) -> Tensor:
        """The map's codes; the gradient is that of the code expected halfway through the map."""
        logits_BLV, codebook_VC = prediction.logits_BLV, self.codebook_VC
        with torch.no_grad():
            ids_BL = self.tokens(sequence_BLC, logits_BLV, self.num_steps)
            codes_BLC = F.embedding(ids_BL, codebook_VC)
        halfway = self.grid(self.num_steps).s[self.num_steps // 2]
        scores_BLV = bridge_scores(sequence_BLC, codes_BLC, logits_BLV, codebook_VC, halfway)
        return straight_through(ids_BL, torch.softmax(scores_BLV, -1), codebook_VC)

    @torch.no_grad()
    def emit(self, sequence_BLC: Tensor, labels_B: Tensor, start: int, stop: int) -> Tensor:
        """The map's codes; logits and map only of the positions asked for."""
        start_B = torch.full((len(sequence_BLC),), start, device=self.device)
        logits_BNV = self.stages(sequence_BLC, labels_B, start_B, range(start, stop))[-1]
        return F.embedding(self.tokens(sequence_BLC[:, start:stop], logits_BNV, self.num_steps), self.codebook_VC)

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        super().initialize_from(teacher)
        nn.init.normal_(self.noise_map.weight, std=0.02)
        nn.init.zeros_(self.noise_map.bias)
        for draft_map in self.draft_maps:
            assert isinstance(draft_map, nn.Linear)
            nn.init.eye_(draft_map.weight)

    def stages(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor, wanted: range) -> list[Tensor]:
        """Logits fp32 [B,N,V]: of each draft, without the last AR step that takes part, which nothing reads; at last of
        the tokens wanted, from the last block."""
        backbone = self.backbone
        opening = self.opening(sequence_BLC, labels_B, start_B, wanted.stop)
        condition, whole, first = opening.condition, opening.inputs_BND, opening.first
        ids_BN, read = opening.ids_BN, opening.ids_BN.shape[1]
        joins = self.joins if whole.shape[1] - first == self.length else 0
        hidden = whole[:, : first + read] if joins else whole
        logits, done = [], 0
        for after, draft_map in zip(self.drafts, self.draft_maps, strict=True):
            hidden = backbone.hidden(hidden, condition, blocks=range(done, after))
            logits.append(backbone.logits(hidden[:, first : first + read], condition))
            with torch.no_grad():
                drafted_BN = self.tokens(opening.sequence_BNC, logits[-1], self.draft_steps)
                ids_BN = torch.where(opening.resolved_BN, ids_BN, drafted_BN)
            if after == joins:
                hidden = torch.cat([hidden, whole[:, first + read :]], 1)
            known_BMD = backbone.token_inputs(ids_BN)
            fed_BMD = draft_map(known_BMD[:, : known_BMD.shape[1] - whole.shape[1] + hidden.shape[1]])
            hidden = hidden + F.pad(fed_BMD, (0, 0, hidden.shape[1] - fed_BMD.shape[1], 0))
            done = after
        hidden = backbone.hidden(hidden, condition, blocks=range(done, backbone.depth))
        wanted_BND = hidden[:, first + wanted.start : first + wanted.stop]
        return [*logits, backbone.logits(wanted_BND, condition)]

    def tokens(self, noise_BNC: Tensor, logits_BNV: Tensor, num_steps: int) -> Tensor:
        """int64 [B,N]: each position's noise through the map."""
        grid = self.grid(num_steps)
        return noise_to_tokens(noise_BNC, logits_BNV, self.codebook_VC, grid=grid)

    def grid(self, num_steps: int) -> FlowGrid:
        """The map's grid; it follows from the codebook, which does not change."""
        if num_steps not in self._grids:
            self._grids[num_steps] = flow_grid(self.codebook_VC, num_steps)
        return self._grids[num_steps]


def bridge_scores(noise_BNC: Tensor, codes_BNC: Tensor, logits_BNV: Tensor, codebook_VC: Tensor, s: float) -> Tensor:
    """log w of the map (`ddecode.flow`) up to a constant per row, fp32 [B,N,V], at s and z = eps + s c: where a path
    straight from its noise to the code it ends on stands at s."""
    z_BNC = noise_BNC.float() + s * codes_BNC
    return logits_BNV + s * z_BNC @ codebook_VC.T - s * s / 2 * codebook_VC.square().sum(-1)
