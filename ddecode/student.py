"""Students: what they have in common, and DD1's, new inputs and two heads around a teacher's own backbone
(arXiv 2412.17153, section 3.2). The other kinds are in `ddecode.draft_student`, `ddecode.staggered_student`,
`ddecode.wavefront_student` and `ddecode.dd2_student`.

B batch, L token positions, P condition positions, V codes, C code width, D model width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddecode.arguments import INTEGERS, MOST, check_labels, check_logits, check_vectors, check_whole, shown
from ddecode.teacher import Teacher
from ddecode.typed import build
from ddecode.types import Backbone, Condition, Labels, Prediction, Tokenizer


class ContinuousHead(nn.Module):
    """Hidden states to vectors in R^C: layer norm, shift and scale by class, linear.

    `scale_shift_table` holds the shift in row 0 and the scale in row 1; the class vector is added to both.
    """

    def __init__(self, width: int, code_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, code_width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, hidden_BLD: Tensor, class_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + class_BD[:, None]).chunk(2, dim=1)
        normed = F.layer_norm(hidden_BLD, hidden_BLD.shape[-1:], eps=1e-6)
        return self.linear(normed * (1 + scale) + shift)


class Student(nn.Module, ABC):
    """Maps a partly resolved sequence to all tokens at once.

    Args:
        backbone: the teacher's kind of backbone.
        tokenizer: the teacher's; held for its codebook and for decoding, not trained, not in the state dict.
        starts: numbers of resolved tokens it was trained to continue from, rising.

    Raises:
        ValueError: starts are others.
    """

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, *, starts: tuple[int, ...]) -> None:
        super().__init__()
        assert isinstance(backbone, nn.Module)
        self.length = sum(backbone.steps)
        starts = build(tuple[int, ...], starts, "starts")
        if not starts or list(starts) != sorted(set(starts)) or starts[0] < 0 or starts[-1] >= self.length:
            raise ValueError(f"starts must lie in 0..{self.length - 1} and rise, got {list(starts)}")
        self.backbone = backbone
        self._tokenizer = [tokenizer]  # in a list, so that its weights are not this module's
        self.starts = starts
        self.split = self.length
        """Positions before it are emitted as tokens, the rest as vectors."""
        self.indicator = nn.Embedding(2, backbone.width)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer[0]

    @property
    def codebook_VC(self) -> Tensor:
        return self.tokenizer.codebook_VC

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def device(self) -> torch.device:
        return self.indicator.weight.device

    @property
    def passes(self) -> list[tuple[int, int]]:
        """Start and end of each kind of pass that it is trained in."""
        return [(start, self.length) for start in self.starts]

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What a `config.json` says of it beside its backbone; `build_student` takes the same."""

    @abstractmethod
    def forward(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor) -> Prediction:
        """`predict` on checked arguments and with gradients."""

    @abstractmethod
    def emitted(self, prediction: Prediction, sequence_BLC: Tensor) -> Tensor:
        """What sampling would emit, [B,N,C] with gradients, for a prediction cut to any of its samples.

        A token's code is chosen as in sampling; its gradient is that of an expected code (straight through).
        """

    @abstractmethod
    def emit(self, sequence_BLC: Tensor, labels_B: Tensor, start: int, stop: int) -> Tensor:
        """What sampling keeps of one pass, [B,stop-start,C], without gradients. Positions that no kept one reads are
        left out of the pass, so that a first pass of which little is kept costs little.

        Raises:
            ValueError: the network overflows, so that its logits say nothing.
        """

    def check_starts(self, starts: Iterable[int]) -> None:
        """
        Raises:
            ValueError: students of this kind cannot go on from so many tokens; most can from any number.
        """

    def reach(self, stop: int) -> int:
        """The end of the AR step of token `stop - 1`: no token before it reads anything behind it."""
        return next(end for end in accumulate(self.backbone.steps) if end >= stop)

    @torch.no_grad()
    def predict(self, sequence_BLC: Tensor, class_labels: Labels, start: int | Tensor = 0) -> Prediction:
        """One pass.

        Args:
            sequence_BLC: fp32 [B,L,C], the first `start` positions resolved (codes), the rest their own noise.
            class_labels: int, list or LongTensor [B].
            start: resolved tokens, an int or LongTensor [B].

        Returns:
            Both heads over all L positions; those before `start` mean nothing.

        Raises:
            ValueError: the sequence is not [B, L, C] or not finite, a label or a start is out of range.
        """
        check_vectors("the sequence", sequence_BLC, self.length, self.codebook_VC.shape[1])
        labels_B = check_labels(class_labels, len(sequence_BLC), self.num_classes, self.device)
        if not isinstance(start, Tensor):
            check_whole("start", start, -MOST)
        start_B = torch.as_tensor(start, device=self.device)
        if start_B.dim() > 1 or start_B.numel() not in (1, len(sequence_BLC)) or start_B.dtype not in INTEGERS:
            raise ValueError(f"start must be an int or an integer tensor [{len(sequence_BLC)}], got {shown(start)}")
        start_B = start_B.expand(len(sequence_BLC))
        if int(start_B.min()) < 0 or int(start_B.max()) >= self.length:
            raise ValueError(f"start must lie in 0..{self.length - 1}, got {start}")
        self.check_starts(start_B.tolist())
        return self(sequence_BLC.to(self.device, self.indicator.weight.dtype), labels_B, start_B)

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        """Copy the teacher's weights by name (`Backbone.student_state`); what is new starts neutral.

        Raises:
            ValueError: a shared weight is missing or misshapen.
        """
        assert isinstance(self.backbone, nn.Module)
        source = self.backbone.student_state(teacher.backbone, teacher.codebook_VC)
        target = self.backbone.state_dict()
        wrong = [n for n in target if n not in source or source[n].shape != target[n].shape]
        if wrong:
            raise ValueError(f"the teacher lacks, or has in another shape: {', '.join(wrong)}")
        self.backbone.load_state_dict({n: source[n] for n in target})
        nn.init.zeros_(self.indicator.weight)


class DD1Student(Student):
    """The student of DD1: each position reads its own noise and says its token itself.

    Args:
        backbone: as for every student; it reads code vectors (`vector_inputs`).
        tokenizer, starts: as for every student.
        split: positions before it are emitted as argmax tokens, the rest as continuous vectors.
        layerwise: also add the indicator, through a linear map each, inside every block and before the heads.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        *,
        starts: tuple[int, ...],
        split: int,
        layerwise: bool = False,
    ) -> None:
        super().__init__(backbone, tokenizer, starts=starts)
        check_whole("split", split, -MOST)
        if not 0 <= split <= self.length:
            raise ValueError(f"split must lie in 0..{self.length}, got {split}")
        self.split = split
        maps = backbone.depth + 1 if layerwise else 0
        self.indicator_maps = nn.ModuleList(nn.Linear(backbone.width, backbone.width) for _ in range(maps))
        self.continuous_head = ContinuousHead(backbone.width, tokenizer.codebook_VC.shape[1])

    def options(self) -> dict[str, Any]:
        return {"starts": self.starts, "split": self.split}

    def forward(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor) -> Prediction:
        hidden_BLD, condition = self.hidden(sequence_BLC, labels_B, start_B)
        return Prediction(
            embeddings_BLC=self.embeddings(hidden_BLD, condition),
            logits_BLV=self.backbone.logits(hidden_BLD, condition),
        )

    def hidden(self, sequence_BLC: Tensor, labels_B: Tensor, start_B: Tensor) -> tuple[Tensor, Condition]:
        """Hidden states [B,N,D] at the tokens' own positions, and what the labels became. The sequence may end behind
        any AR step."""
        condition = self.backbone.condition(labels_B)
        prefix = condition.prefix_BPD.shape[1]
        inputs = torch.cat([condition.prefix_BPD, self.backbone.vector_inputs(sequence_BLC)], 1)
        positions_N = torch.arange(-prefix, sequence_BLC.shape[1], device=inputs.device)
        resolved_BN = (positions_N < start_B[:, None]).long()
        inputs = inputs + self.indicator(resolved_BN)
        if not len(self.indicator_maps):
            return self.backbone.hidden(inputs, condition)[:, prefix:], condition
        # the indicator has two rows, so its maps do as well
        *inside, last = (F.embedding(resolved_BN, linear(self.indicator.weight)) for linear in self.indicator_maps)
        hidden_BND = self.backbone.hidden(inputs, condition, residuals=inside) + last
        return hidden_BND[:, prefix:], condition

    def embeddings(self, hidden_BND: Tensor, condition: Condition) -> Tensor:
        """The continuous head, fp32 [B,N,C]."""
        assert condition.class_BD is not None
        return self.continuous_head(hidden_BND, condition.class_BD).float()

    def emitted(self, prediction: Prediction, sequence_BLC: Tensor) -> Tensor:
        """Argmax codes before `split`, the continuous head after it."""
        split = self.split
        parts: Sequence[Tensor] = [prediction.embeddings_BLC[:, split:]]
        if split:
            weights_BNV = torch.softmax(prediction.logits_BLV[:, :split], -1)
            parts = [straight_through(weights_BNV.argmax(-1), weights_BNV, self.codebook_VC), *parts]
        return torch.cat(list(parts), 1)

    @torch.no_grad()
    def emit(self, sequence_BLC: Tensor, labels_B: Tensor, start: int, stop: int) -> Tensor:
        """Argmax codes before `split`, the continuous head after; each head only where it is taken from."""
        start_B = torch.full((len(sequence_BLC),), start, device=self.device)
        hidden_BLD, condition = self.hidden(sequence_BLC[:, : self.reach(stop)], labels_B, start_B)
        border = min(max(self.split, start), stop)
        parts = []
        if start < border:
            ids = check_logits(self.backbone.logits(hidden_BLD[:, start:border], condition)).argmax(-1)
            parts.append(F.embedding(ids, self.codebook_VC))
        if border < stop:
            parts.append(self.embeddings(hidden_BLD[:, border:stop], condition))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def initialize_from(self, teacher: Teacher) -> None:
        super().initialize_from(teacher)
        for name, parameter in self.indicator_maps.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)


def straight_through(ids_BN: Tensor, weights_BNV: Tensor, codebook_VC: Tensor) -> Tensor:
    """The codes of `ids_BN` with the gradient of the expected code under `weights_BNV`, [B,N,C]."""
    expected = weights_BNV @ codebook_VC
    return expected + (F.embedding(ids_BN, codebook_VC) - expected).detach()


def kept_layers(depth: int, kept: int) -> list[int]:
    """Indices of `kept` layers out of `depth`, evenly spaced, first and last among them; of one layer the first."""
    if not 1 <= kept <= depth:
        raise ValueError(f"a student of {kept} layers cannot be cut from a teacher of {depth}")
    return [round(i * (depth - 1) / max(1, kept - 1)) for i in range(kept)]


def renumber_layers(state: Mapping[str, Tensor], layers: str, depth: int, kept: int) -> dict[str, Tensor]:
    """The state of a backbone cut to `kept` layers: `{layers}.J.rest` becomes `{layers}.I.rest`."""
    new_index = {old: new for new, old in enumerate(kept_layers(depth, kept))}
    renumbered = {}
    for name, tensor in state.items():
        head, dot, rest = name.partition(f"{layers}.")
        if head or not dot:
            renumbered[name] = tensor
            continue
        layer, _, tail = rest.partition(".")
        if int(layer) in new_index:
            renumbered[f"{layers}.{new_index[int(layer)]}.{tail}"] = tensor
    return renumbered
