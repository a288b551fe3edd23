"""Guidance networks: what is learned of a generator beside it, as velocities (DD2, arXiv 2510.21003) or as tokens.

B batch, R noise draws that share one pass of a backbone, L token positions, V codes, C code width, D feature or model
width.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ddecode.codebook import nearest_code
from ddecode.diffusion_head import DiffusionHead
from ddecode.flow import flow_grid
from ddecode.objectives.posterior import NoisyCodes, posterior_mean
from ddecode.teacher import Teacher, filter_log_probs, forced_hidden, unroll
from ddecode.trajectory import flow_pick
from ddecode.types import Backbone, Condition


class Guidance(nn.Module, ABC):
    """What is learned of a generator: the distribution of each position, given the tokens of earlier AR steps.

    `ARDiffusion` learns velocities, as DD2 does; `TokenGuidance` probabilities of tokens, which say the same of a
    generator that emits codes alone.

    Args:
        backbone: trained; it reads token ids as the teacher does.
        passes: how many kinds of pass the generator makes. What it emits behind a prefix differs from what it emits
            there in one pass, so all kinds but the first get a vector of their own beside the condition.
    """

    def __init__(self, backbone: Backbone, passes: int) -> None:
        super().__init__()
        assert isinstance(backbone, nn.Module)
        self.backbone = backbone
        self.passes = nn.Embedding(passes, backbone.width, padding_idx=0)
        nn.init.zeros_(self.passes.weight)

    def condition(self, labels: Any, pass_B: Tensor | None) -> Condition:
        """The backbone's, told the pass, int64; None is the first for all."""
        condition = self.backbone.condition(labels)
        if pass_B is None:
            return condition
        prefix_BPD = condition.prefix_BPD
        return dataclasses.replace(condition, prefix_BPD=prefix_BPD + self.passes(pass_B)[:, None].to(prefix_BPD.dtype))

    @abstractmethod
    def posterior_means(
        self, ids_BL: Tensor, labels: Any, noisy: NoisyCodes, codebook_VC: Tensor, pass_B: Tensor | None = None
    ) -> Tensor:
        """D of the noisy codes, fp32 [R,B,L,C], with gradients to them alone.

        Args:
            ids_BL: int64, in teacher order.
            labels: int64 [B], or captions.
            noisy: of the generator's output.
            codebook_VC: the codes.
            pass_B: int64, in which of its passes the generator emitted them; None is the first.
        """

    @abstractmethod
    def errors(
        self, ids_BL: Tensor, labels: Any, codes_BLC: Tensor, noisy: NoisyCodes, pass_B: Tensor | None = None
    ) -> Tensor:
        """What it gets wrong of codes whose nearest tokens are `ids_BL`, fp32 [B,L] with gradients to its weights."""

    @abstractmethod
    def sample(self, noise_BLC: Tensor, labels: Any, codebook_VC: Tensor, num_steps: int = 16) -> Tensor:
        """Tokens int64 [B,L] of the distribution it has learned, each from its own noise, fp32 standard normal."""


class ARDiffusion(Guidance):
    """An AR model whose head gives velocities of a noisy code instead of logits.

    It reads token ids as the teacher does, so position i knows the tokens of earlier AR steps only.

    Args:
        backbone: trained; its logit head is not used.
        codebook_VC: sets the scale of the head.
        passes: see `Guidance`.
        width: of the head; None is the backbone's.
        depth: of the head.
    """

    def __init__(
        self, backbone: Backbone, codebook_VC: Tensor, *, passes: int = 1, width: int | None = None, depth: int = 3
    ) -> None:
        super().__init__(backbone, passes)
        self.head = DiffusionHead(backbone.width, codebook_VC.shape[1], width, depth)
        self.head.calibrate(codebook_VC)

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, *, passes: int = 1, width: int | None = None, depth: int = 3
    ) -> "ARDiffusion":
        """A copy of the teacher's backbone under a fresh head."""
        backbone, codebook_VC = teacher.trainable_backbone(), teacher.codebook_VC
        return cls(backbone, codebook_VC, passes=passes, width=width, depth=depth).to(teacher.device)

    def forward(
        self, ids_BL: Tensor, labels: Any, x_RBLC: Tensor, time_RBL: Tensor, pass_B: Tensor | None = None
    ) -> Tensor:
        """Velocities of noisy codes, given the tokens before them.

        Args:
            ids_BL: int64, in teacher order.
            labels: int64 [B], or captions.
            x_RBLC: noisy codes; R may be left out.
            time_RBL: noise level in (0, 1].
            pass_B: see `posterior_means`.

        Returns:
            fp32, of x's shape.
        """
        return self.head(self.features(ids_BL, labels, pass_B), x_RBLC, time_RBL)

    def features(self, ids_BL: Tensor, labels: Any, pass_B: Tensor | None = None) -> Tensor:
        """What the tokens of earlier AR steps say about each position: [B,L,D]."""
        return forced_hidden(self.backbone, ids_BL, self.condition(labels, pass_B))

    def posterior_means(
        self, ids_BL: Tensor, labels: Any, noisy: NoisyCodes, codebook_VC: Tensor, pass_B: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            features_BLD = self.features(ids_BL, labels, pass_B)
        frozen = {name: parameter.detach() for name, parameter in self.head.named_parameters()}
        arguments = (features_BLD, noisy.x_RBLC, noisy.time_RBL)
        velocity_RBLC: Tensor = functional_call(self.head, frozen, arguments)
        return noisy.x_RBLC - noisy.time_RBL[..., None] * velocity_RBLC

    def errors(
        self, ids_BL: Tensor, labels: Any, codes_BLC: Tensor, noisy: NoisyCodes, pass_B: Tensor | None = None
    ) -> Tensor:
        """Squared, of eps - q, whose mean is the velocity; the mean over noise draws and directions."""
        velocity_RBLC = self(ids_BL, labels, noisy.x_RBLC, noisy.time_RBL, pass_B)
        return (velocity_RBLC - (noisy.noise_RBLC - codes_BLC)).square().mean((0, -1))

    @torch.no_grad()
    def sample(self, noise_BLC: Tensor, labels: Any, codebook_VC: Tensor, num_steps: int = 16) -> Tensor:
        """Tokens of the distribution it has learned, each from its own noise, as the teacher's map makes them.

        Position by position dx/dt = v runs from the noise at t = 1 to a code at t = 0, by Heun's method. It takes
        one pass of the backbone for each AR step, as plain sampling without guidance does, and 2 num_steps - 1
        evaluations of the head.

        Args:
            noise_BLC: standard normal fp32.
            labels: int64 [B], or captions.
            codebook_VC: the codes that a path may end on; the nearest counts.
            num_steps: steps of the ODE.

        Returns:
            ids int64 [B,L].
        """

        def read(hidden_BND: Tensor, step: int, start: int) -> Tensor:
            x_BNC = noise_BLC[:, start : start + hidden_BND.shape[1]]
            for k in reversed(range(num_steps)):
                now_BN, then_BN = (x_BNC.new_full(x_BNC.shape[:2], level / num_steps) for level in (k + 1, k))
                slope_BNC = self.head(hidden_BND, x_BNC, now_BN)
                if k:
                    ahead_BNC = self.head(hidden_BND, x_BNC - slope_BNC / num_steps, then_BN)
                    slope_BNC = (slope_BNC + ahead_BNC) / 2
                x_BNC = x_BNC - slope_BNC / num_steps
            return nearest_code(x_BNC, codebook_VC)

        return unroll(self.backbone, self.condition(labels, None), read)


class TokenGuidance(Guidance):
    """An AR model of the tokens that a student emits in each of its passes.

    What it says of noisy codes is exact for the probabilities that it has learned, so, unlike a network of velocities,
    it has no first stage to go through before it serves in the score term.
    """

    @classmethod
    def from_teacher(cls, teacher: Teacher, passes: int) -> "TokenGuidance":
        """A copy of the teacher's backbone."""
        return cls(teacher.trainable_backbone(), passes).to(teacher.device)

    def forward(self, ids_BL: Tensor, labels: Any, pass_B: Tensor | None = None) -> Tensor:
        """Logits fp32 [B,L,V], each position given the tokens of earlier AR steps; pass_B int64, None is 0 for all."""
        condition = self.condition(labels, pass_B)
        return self.backbone.logits(forced_hidden(self.backbone, ids_BL, condition), condition).float()

    def posterior_means(
        self, ids_BL: Tensor, labels: Any, noisy: NoisyCodes, codebook_VC: Tensor, pass_B: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            log_probs_BLV = self(ids_BL, labels, pass_B).log_softmax(-1)
        return posterior_mean(noisy.x_RBLC, noisy.time_RBL, log_probs_BLV, codebook_VC)

    def errors(
        self, ids_BL: Tensor, labels: Any, codes_BLC: Tensor, noisy: NoisyCodes, pass_B: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of the tokens, in nats; it sees codes, and no noise."""
        return F.cross_entropy(self(ids_BL, labels, pass_B).transpose(1, 2), ids_BL, reduction="none")

    @torch.no_grad()
    def sample(self, noise_BLC: Tensor, labels: Any, codebook_VC: Tensor, num_steps: int = 16) -> Tensor:
        """By the exact noise-to-token map of what it has learned."""
        condition = self.condition(labels, None)
        pick = flow_pick(noise_BLC, codebook_VC, flow_grid(codebook_VC, num_steps))

        def read(hidden_BND: Tensor, step: int, start: int) -> Tensor:
            return pick(filter_log_probs(self.backbone.logits(hidden_BND, condition)), start)

        return unroll(self.backbone, condition, read)
