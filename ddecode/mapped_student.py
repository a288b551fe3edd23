"""What students have in common that leave the noise-to-token map to its formula.

DD1's student must learn two things at once: which tokens its teacher would find likely, and how each position's noise
picks one of them. The second is known exactly (`ddecode.flow`). So these students stand where their teacher stands: a
position sees only what lies before it, predicts the teacher's probabilities, and the map turns them and the position's
own noise into the token. Trained by cross-entropy, their best prediction is the teacher's probability given what a
position sees, and their best tokens keep the teacher's variance.

B batch, L token positions, N positions of one call, V codes, C code width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.flow import FlowGrid, flow_grid, tokens_of
from ddecode.student import Student, straight_through
from ddecode.types import Backbone, Condition, Labels, Prediction, Tokenizer


class MappedStudent(Student):
    """Its logits are predicted probabilities; the exact map makes the tokens.

    Args:
        backbone, tokenizer, starts: as for every student.
        num_steps: evaluations of the map that makes the tokens; best those of the pairs.
    """

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, *, starts: tuple[int, ...], num_steps: int) -> None:
        super().__init__(backbone, tokenizer, starts=starts)
        if num_steps < 1:
            raise ValueError(f"the map needs at least 1 evaluation, got {num_steps}")
        self.num_steps = num_steps
        self._grids: dict[int, FlowGrid] = {}

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

    def head(self) -> list[nn.Parameter]:
        """What half precision leaves in fp32: logits that are rounded send part of the noise to other tokens, and each
        of these moves those that are read after it."""
        parameters = getattr(self.backbone, "head_parameters", list)
        return list(parameters())

    def reader(self) -> Callable[[Tensor, Condition], Tensor]:
        """Hidden vectors and condition to logits fp32, in fp32 where only `head` is."""
        head, logits = self.head(), self.backbone.logits
        if not head or head[0].dtype == self.indicator.weight.dtype:
            return logits

        def read(hidden_BND: Tensor, condition: Condition) -> Tensor:
            with torch.autocast(self.device.type, enabled=False):
                return logits(hidden_BND.float(), condition)

        return read

    def tokens(self, noise_BNC: Tensor, logits_BNV: Tensor, num_steps: int) -> Tensor:
        """int64 [B,N]: each position's noise through the map."""
        return tokens_of(noise_BNC, logits_BNV, self.grid(num_steps))

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
