"""Tokenizers: squared and perceptual error of what they decode, and codes that nobody uses moved to where they serve.

B batch, V codes, C code width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.evaluation.features import Features, perceptual_distance
from ddecode.training import Objective

FIRST, EVERY, UNTIL = 20, 100, 0.7
"""When codes are moved: after so many steps, then at each multiple of `EVERY`, up to this share of the run."""


class CountedTokenizer(nn.Module):
    """A tokenizer and how often its codes were used since they were last moved, so that both are in a checkpoint."""

    tokenizer: Any
    used_V: Tensor

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("used_V", torch.zeros(len(tokenizer.codebook_VC), dtype=torch.int64))

    @property
    def codes_VC(self) -> Tensor:
        """The codebook's parameter."""
        codes: Tensor = self.tokenizer.quantize.embedding.weight
        return codes


class ReconstructionObjective(Objective):
    """What trains a tokenizer of either family.

    Args:
        tokenizer: trained; its codes are drawn anew.
        features: network of the perceptual term, frozen.
        perceptual: its weight.
        mirror: whether mirror images are learned as well.
        grey: whether the images are, so that the decoder's three channels become one.
    """

    model: CountedTokenizer

    def __init__(
        self, tokenizer: Any, features: Features, *, perceptual: float, mirror: bool, grey: bool = False
    ) -> None:
        super().__init__()
        self.model = CountedTokenizer(tokenizer)
        self.features, self.perceptual, self.mirror, self.grey = features, perceptual, mirror, grey
        self._moved_at = 0  # the step, of whose parts (gradient accumulation) only the first moves codes
        nn.init.normal_(self.model.codes_VC)
        if grey:  # its last three rows start equal and, with equal gradients, stay so
            last = tokenizer.decoder.conv_out
            with torch.no_grad():
                last.weight.copy_(last.weight[:1].expand_as(last.weight))
                last.bias.zero_()

    def forward(
        self, images_B3HW: Tensor, labels_B: Tensor, generator: torch.Generator, progress: float = 0.0, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images_B3HW: fp32 in [-1,1]; labels are not read."""
        tokenizer, used_V = self.model.tokenizer, self.model.used_V
        mirrored_B = torch.rand(len(images_B3HW), generator=generator) < (0.5 if self.mirror else 0.0)
        x = torch.where(mirrored_B.to(images_B3HW.device)[:, None, None, None], images_B3HW.flip(-1), images_B3HW)
        if progress < UNTIL and step != self._moved_at and (step == FIRST or step % EVERY == 0):
            self.move_dead_codes(x, generator)
            self._moved_at = step
        rebuilt = tokenizer.reconstruct(x, generator)
        used_V += rebuilt.ids.flatten().bincount(minlength=len(used_V))
        y = rebuilt.images_B3HW.float()
        if self.grey:
            y = y.mean(1, keepdim=True).expand_as(y)
        square = F.mse_loss(y, x)
        perceptual = perceptual_distance(self.features, y, x).mean()
        dead = (used_V == 0).float().sum()
        metrics = {"codes": rebuilt.code_loss, "square": square, "perceptual": perceptual, "dead_codes": dead}
        loss = rebuilt.code_loss + square + self.perceptual * perceptual
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    @torch.no_grad()
    def move_dead_codes(self, images_B3HW: Tensor, generator: torch.Generator) -> None:
        """Codes that no image used since the last time go where vectors are."""
        targets_NC = self.model.tokenizer.reconstruct(images_B3HW, generator).targets_NC
        dead = torch.nonzero(self.model.used_V == 0)[:, 0]
        chosen = torch.randint(len(targets_NC), (len(dead),), generator=generator).to(dead.device)
        self.model.codes_VC[dead] = targets_NC[chosen].to(self.model.codes_VC.dtype)
        self.model.used_V.zero_()
