"""A teacher of two tokens whose joint distribution is known, the guidance network that is exact for it, and a small
generator to train against it.

R noise draws, B batch, L positions, N positions of one call, V codes, C code width, D model width.
"""

from typing import Any

import torch
from tiny import ScaleTokenizer, seeded
from torch import Tensor, nn

from ddecode.codebook import nearest_code
from ddecode.objectives.guidance import ARDiffusion
from ddecode.objectives.posterior import posterior_mean, velocity
from ddecode.teacher import Recipe, Teacher
from ddecode.types import Condition, KeyValueCache

CODES = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.6, -0.7]])
JOINT = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.0], [0.0, 0.10, 0.20]])
"""Of two tokens; drawing each from its marginal is 0.415 away from it in total variation."""


class TableBackbone(nn.Module):
    """A `Backbone` of two tokens with any joint distribution: a hidden state says which token came before."""

    steps, depth, num_classes = (1, 1), 1, 1

    def __init__(self, joint_VV: Tensor) -> None:
        super().__init__()
        self.vocab_size, self.width = len(joint_VV), len(joint_VV) + 1
        self.table = nn.Parameter(torch.cat([joint_VV.sum(1)[None], joint_VV / joint_VV.sum(1, keepdim=True)]).log())

    def condition(self, labels: Tensor) -> Condition:
        return Condition(prefix_BPD=torch.eye(self.width)[torch.zeros_like(labels)][:, None])

    def unconditional(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.num_classes)

    def null_labels(self, batch: int) -> Tensor:
        return torch.full((batch,), self.num_classes)

    def guidance_weight(self, scale: float, step: int) -> float:
        return scale

    def token_inputs(self, ids_BN: Tensor, seen: int = 0) -> Tensor:
        return torch.eye(self.width)[ids_BN + 1][:, seen:]

    def vector_inputs(self, sequence_BLC: Tensor) -> Tensor:
        raise NotImplementedError

    def student_state(self, teacher: Any, codebook_VC: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def new_cache(self, batch: int) -> KeyValueCache:
        return KeyValueCache(0, (batch, 1, 0, 1), device="cpu", dtype=torch.float32)

    def hidden(self, inputs_BND: Tensor, condition: Any, *, cache: Any = None, residuals: Any = None) -> Tensor:
        return inputs_BND

    def logits(self, hidden_BND: Tensor, condition: Any) -> Tensor:
        return self.table[hidden_BND.argmax(-1)]


def table_teacher(joint_VV: Tensor, codebook_VC: Tensor) -> Teacher:
    tokenizer = ScaleTokenizer(0)
    tokenizer.codebook_VC = codebook_VC
    return Teacher(TableBackbone(joint_VV), tokenizer, family="toy")


def labels_of(ids_BL: Tensor) -> Tensor:
    return torch.zeros(len(ids_BL), dtype=torch.int64)


def draw_ids(joint_VV: Tensor, count: int, generator: torch.Generator) -> Tensor:
    drawn = torch.multinomial(joint_VV.flatten(), count, True, generator=generator)
    return torch.stack([drawn // len(joint_VV), drawn % len(joint_VV)], 1)


def frequencies(ids_BL: Tensor, V: int) -> Tensor:
    return torch.bincount(ids_BL[:, 0] * V + ids_BL[:, 1], minlength=V * V).view(V, V) / len(ids_BL)


def total_variation(ids_BL: Tensor, joint_VV: Tensor) -> float:
    return (frequencies(ids_BL, len(joint_VV)) - joint_VV).abs().sum().item() / 2


class AnalyticHead(nn.Module):
    """Velocities of a teacher whose log-probabilities stand where features would, less a constant."""

    def __init__(self, codebook_VC: Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.codebook_VC, self.offset = codebook_VC, offset

    def forward(self, log_probs_BLV: Tensor, x_RBLC: Tensor, time_RBL: Tensor) -> Tensor:
        mean = posterior_mean(x_RBLC, time_RBL, log_probs_BLV, self.codebook_VC)
        return velocity(x_RBLC, mean, time_RBL) - self.offset


class AnalyticGuidance(ARDiffusion):
    """The guidance network of a generator that samples as `teacher` does."""

    def __init__(self, teacher: Teacher, offset: float = 0.0) -> None:
        super().__init__(teacher.backbone, teacher.codebook_VC)
        self.teacher, self.head = teacher, AnalyticHead(teacher.codebook_VC, offset)

    def features(self, ids_BL: Tensor, labels: Any, pass_B: Tensor | None = None) -> Tensor:
        return self.teacher.log_probs(ids_BL, labels, Recipe())


class Generator(nn.Module):
    """One step from noise [B,2,C] to two positions: continuous vectors, or codes straight through their argmax.

    It begins with positions that know nothing of each other.
    """

    def __init__(self, codebook_VC: Tensor, *, emits_codes: bool) -> None:
        super().__init__()
        V, C = codebook_VC.shape
        self.codebook_VC, self.emits_codes = codebook_VC, emits_codes
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(2 * C, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
            nn.Linear(64, 2 * (V if emits_codes else C)), nn.Unflatten(1, (2, -1)),
        )  # fmt: skip

    def forward(self, noise_BLC: Tensor) -> Tensor:
        if not self.emits_codes:
            return noise_BLC + self.network(noise_BLC)
        logits_BLV = self.logits(noise_BLC)
        expected = logits_BLV.softmax(-1) @ self.codebook_VC
        return expected + (self.codebook_VC[logits_BLV.argmax(-1)] - expected).detach()

    def logits(self, noise_BLC: Tensor) -> Tensor:
        """Of the codes, whose argmax is emitted."""
        return 2 * noise_BLC @ self.codebook_VC.T + self.network(noise_BLC)

    @torch.no_grad()
    def ids(self, count: int) -> Tensor:
        noise = torch.randn(count, 2, self.codebook_VC.shape[1], generator=seeded(9))
        return nearest_code(self(noise), self.codebook_VC)
