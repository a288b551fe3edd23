"""DD2's one-step generator (arXiv 2510.21003, section 4): the AR-diffusion model that its first stage tunes. It reads
noise where the teacher reads tokens, and its head goes from noise to a vector at once.

B batch, L token positions, V codes, C code width, D model width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ddecode.diffusion_head import DiffusionHead
from ddecode.shifted_student import ShiftedStudent
from ddecode.teacher import Teacher
from ddecode.types import Backbone, Prediction, Tokenizer

HEAD_DEPTH = 3
"""Blocks of a diffusion head where nothing else is said."""
FITTED_TOKENS = 1 << 14
"""Input positions on which the map of noise is fitted."""


class DD2Student(ShiftedStudent):
    """Emits q = x - t v(x, t) at every position, from its own noise and what it sees of the noise before it.

    x is the noise with mean and scale of noisy codes at the level t: (1-t) m and sqrt((1-t)^2 sigma^2 + t^2) for codes
    of mean m and standard deviation sigma. In DD2 t is 1 and x the noise itself. There the right v leads to the mean of
    all that may be, so a student that begins as its first stage ended does not look at its own noise yet; at a lower
    level it begins with part of the spread it is to have, as score identity distillation does (arXiv 2404.04057).

    Args:
        backbone: the teacher's own kind, reading token ids (`token_inputs`, `mixed_inputs`).
        tokenizer, starts: as for every student.
        head_depth: blocks of the diffusion head.
        noise_level: t, in (0, 1].
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        *,
        starts: tuple[int, ...],
        head_depth: int = HEAD_DEPTH,
        noise_level: float = 1.0,
    ) -> None:
        super().__init__(backbone, tokenizer, starts=starts)
        if not 0 < noise_level <= 1:
            raise ValueError(f"noise_level must lie in (0, 1], got {noise_level}")
        self.split = 0
        self.noise_level = noise_level
        self.head = DiffusionHead(backbone.width, tokenizer.codebook_VC.shape[1], depth=head_depth)
        self.head.calibrate(tokenizer.codebook_VC)

    def options(self) -> dict[str, Any]:
        return {"starts": self.starts, "head_depth": len(self.head.blocks), "noise_level": self.noise_level}

    def forward(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor) -> Prediction:
        """The vectors emitted, and minus half their squared distance to each code, so that argmax is the nearest."""
        emitted_BLC = self.vectors(sequence_BLC, labels_B, start_B, range(self.length))
        codes_VC = self.codebook_VC
        squares_BLV = emitted_BLC.square().sum(-1)[..., None] + codes_VC.square().sum(-1)
        return Prediction(embeddings_BLC=emitted_BLC, logits_BLV=emitted_BLC @ codes_VC.T - squares_BLV / 2)

    def vectors(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor, wanted: range) -> Tensor:
        """q of the tokens wanted, fp32 [B,N,C]."""
        opening = self.opening(sequence_BLC, labels_B, start_B, wanted.stop)
        hidden_BND = self.backbone.hidden(opening.inputs_BND, opening.condition)
        hidden_BND = hidden_BND[:, opening.first + wanted.start : opening.first + wanted.stop]
        t = self.noise_level
        noise_BNC = sequence_BLC[:, wanted.start : wanted.stop].float()
        x_BNC = (1 - t) * self.head.mean_C + self.head.scale(noise_BNC.new_tensor(t)) * noise_BNC
        return x_BNC - t * self.head(hidden_BND, x_BNC, noise_BNC.new_full(noise_BNC.shape[:2], t))

    def noise_inputs(self, noise_BMC: Tensor, resolved_BM: Tensor) -> Tensor:
        """See `ShiftedStudent.noise_inputs`. Nothing behind resolved tokens, whose own vectors are read there: the map
        is fitted to give as much as these would, its bias too."""
        return super().noise_inputs(noise_BMC, resolved_BM).masked_fill(resolved_BM[..., None], 0.0)

    def emitted(self, prediction: Prediction, sequence_BLC: Tensor) -> Tensor:
        return prediction.embeddings_BLC

    @torch.no_grad()
    def emit(self, sequence_BLC: Tensor, labels_B: Tensor, start: int, stop: int) -> Tensor:
        start_B = torch.full((len(sequence_BLC),), start, device=self.device)
        return self.vectors(sequence_BLC, labels_B, start_B, range(start, stop))

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        """The teacher's backbone under a fresh head; a code in place of noise is read as its token is."""
        super().initialize_from(teacher)
        self.fit_noise_map()

    @torch.no_grad()
    def initialize_from_tuned(self, backbone: nn.Module, head: DiffusionHead) -> None:
        """Begin as DD2's first stage ended: backbone and head of `ddecode.objectives.guidance.ARDiffusion`."""
        assert isinstance(self.backbone, nn.Module)
        self.backbone.load_state_dict(backbone.state_dict())
        self.head.load_state_dict(head.state_dict())
        nn.init.zeros_(self.indicator.weight)
        self.fit_noise_map()

    @torch.no_grad()
    def fit_noise_map(self) -> None:
        """Least squares: random codes, seen at the scale of noise, are to give what the backbone reads of them as
        tokens. In float64, so that rounding hides the order of sums."""
        V, C = self.codebook_VC.shape
        read = self.length - self.backbone.steps[-1]
        batch = max(1, FITTED_TOKENS // len(self.known))
        ids_BN = torch.randint(V, (batch, read), generator=torch.Generator().manual_seed(0)).to(self.device)
        none_BN = torch.zeros_like(ids_BN, dtype=torch.bool)
        noise_BNC = (self.codebook_VC[ids_BN] - self.head.mean_C) / self.head.deviation_C
        tokens_BMD, _ = self.backbone.mixed_inputs(ids_BN, ~none_BN, noise_BNC)
        blank_BMD, seen_BMC = self.backbone.mixed_inputs(ids_BN, none_BN, noise_BNC)
        points = torch.cat([seen_BMC.double(), seen_BMC.new_ones(*seen_BMC.shape[:2], 1).double()], -1).flatten(0, 1)
        solution = torch.linalg.lstsq(points, (tokens_BMD - blank_BMD).double().flatten(0, 1)).solution
        self.noise_map.weight.copy_(solution[:C].T)
        self.noise_map.bias.copy_(solution[C])
