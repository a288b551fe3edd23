"""The teacher and its autoregressive loop: the only one in the project, for every family.

B batch, L token positions, N tokens of one step, V codes, C code width; see `ddecode.types`.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddecode.arguments import check_finite, check_ids, check_kind, check_labels, check_logits, check_whole, shown
from ddecode.randomness import draw_uniforms
from ddecode.types import Backbone, Condition, Generators, Labels, Tokenizer

Pick = Callable[[Tensor, int], Tensor]
"""Filtered log-probabilities fp32 [B,N,V] of positions from `start` on, to ids int64 [B,N]."""
Read = Callable[[Tensor, int, int], Tensor]
"""Hidden states [.,N,D] of one AR step's tokens, the step and its first position, to ids int64 [B,N]."""


STRONGEST_GUIDANCE = 1000
"""Published ones are below 10; logits must stay finite."""
LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a teacher is sampled; its pairs are made the same way."""

    guidance_scale: float = 0.0
    """Upstream's number: LlamaGen <= 1 is off, VAR 0 is off."""
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_finite("guidance_scale", self.guidance_scale)
        if not 0 <= self.guidance_scale <= STRONGEST_GUIDANCE:
            raise ValueError(f"guidance_scale must lie in 0..{STRONGEST_GUIDANCE}, got {self.guidance_scale}")
        check_whole("top_k", self.top_k, 0)
        check_finite("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (1 is off), got {self.top_p}")


def guide(logits: Tensor, weight: float | Tensor) -> Tensor:
    """Classifier-free guidance, (1 + w) l_cond - w l_uncond: logits [2B,N,V] of both halves to [B,N,V].

    The weight w is one, or [N,1].
    """
    cond, uncond = logits.chunk(2)
    return torch.lerp(uncond, cond, 1.0 + weight)


def filter_log_probs(logits_BNV: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Log-probabilities after temperature, top-k and then top-p; excluded codes are -inf.

    Ties at the k-th logit stay, and top-p keeps the first code above the threshold, as upstream does; ties with that
    code stay as well.
    """
    logits = logits_BNV.float()
    if temperature != 1.0:
        logits = logits / temperature
    V = logits.shape[-1]
    k = top_k if 0 < top_k < V else V
    if k < V or top_p < 1.0:
        top = largest(logits.detach(), k, ordered=top_p < 1.0)
        if top_p < 1.0:
            probs = top.softmax(-1)
            count = (probs.cumsum(-1) - probs <= top_p).sum(-1, keepdim=True)
            least = top.gather(-1, count - 1)
        else:
            least = top.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits.log_softmax(-1)


def largest(values: Tensor, k: int, *, ordered: bool) -> Tensor:
    """The k largest of each row, [...,k], descending if `ordered`.

    On a CPU by numpy, whose partition and sort are vectorised: torch's take twenty times as long.
    """
    if values.device.type != "cpu":
        return values.topk(k, -1, sorted=ordered).values
    rows = values.numpy()
    top = np.partition(rows, -k, -1)[..., -k:] if k < rows.shape[-1] else rows
    return torch.from_numpy(np.sort(top, -1)).flip(-1) if ordered else torch.from_numpy(top)


def inverse_cdf(uniforms_BL: Tensor) -> Pick:
    """A `pick` that draws by inverting the cumulative distribution at one uniform number per position."""

    def pick(log_probs_BNV: Tensor, start: int) -> Tensor:
        cumulative = log_probs_BNV.exp().cumsum(-1)
        u = uniforms_BL[:, start : start + log_probs_BNV.shape[1], None].to(cumulative.device)
        # just below the total, so that rounding can never reach past the last code of positive mass
        ids_BN = torch.searchsorted(cumulative, u * cumulative[..., -1:] * (1 - 1e-6), right=True)[..., 0]
        return ids_BN.clamp_max(log_probs_BNV.shape[-1] - 1)  # where they are no numbers, of which the walk will tell

    return pick


def argmax(log_probs_BNV: Tensor, start: int) -> Tensor:
    """A `pick` that takes the most probable code."""
    return log_probs_BNV.argmax(-1)


class Teacher:
    """A pre-trained AR image model: a backbone that predicts tokens and the tokenizer they belong to.

    Args:
        backbone: see `ddecode.types.Backbone`; set to evaluation mode.
        tokenizer: see `ddecode.types.Tokenizer`.
        family: the name the model's family has in `ddecode.checkpoint`.
        recipe: how to sample it where nothing else is asked for.
    """

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, *, family: str, recipe: Recipe | None = None) -> None:
        for what, part, needed in (("backbone", backbone, "vocab_size"), ("tokenizer", tokenizer, "codebook_VC")):
            if not hasattr(part, needed):
                raise ValueError(f"a teacher's {what} must have {needed}, see ddecode.types; got {shown(part)}")
        check_kind("family", family, str)
        check_kind("recipe", recipe, Recipe, type(None))
        self.backbone, self.tokenizer, self.family = backbone, tokenizer, family
        self.recipe = recipe or Recipe()
        for part in (backbone, tokenizer):
            if isinstance(part, nn.Module):
                part.eval()
        if backbone.vocab_size != len(tokenizer.codebook_VC):
            raise ValueError(
                f"the model predicts {backbone.vocab_size} codes, the tokenizer has {len(tokenizer.codebook_VC)}"
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """Tokens per AR step; they sum to L."""
        return self.backbone.steps

    @property
    def length(self) -> int:
        """L."""
        return sum(self.steps)

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def codebook_VC(self) -> Tensor:
        """The codebook that `tokenizer.decode` uses."""
        return self.tokenizer.codebook_VC

    @property
    def device(self) -> torch.device:
        return self.codebook_VC.device

    def to(self, device: torch.device | str) -> "Teacher":
        """Move backbone and tokenizer; returns itself."""
        for part in (self.backbone, self.tokenizer):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def trainable_backbone(self) -> Backbone:
        """A copy of the backbone that may be trained."""
        assert isinstance(self.backbone, nn.Module)
        # a backbone may hold the tokenizer, which is not trained and so stays shared
        copied: Backbone = copy.deepcopy(self.backbone, {id(self.tokenizer): self.tokenizer}).requires_grad_(True)
        return copied

    @torch.no_grad()
    def logits(self, ids_BL: Tensor, class_labels: Labels | None) -> Tensor:
        """Teacher forcing in one pass.

        Args:
            ids_BL: int64, in teacher order.
            class_labels: int, list or LongTensor [B]; `num_classes`, and None, are the unconditional label.

        Returns:
            fp32 [B,L,V]; position i is predicted from the tokens of earlier steps.

        Raises:
            ValueError: ids or labels are out of range, or not of this shape.
        """
        check_ids(ids_BL, self.backbone.vocab_size, self.length)
        return self.forward(ids_BL.to(self.device), self.labels(class_labels, len(ids_BL)))

    def labels(self, class_labels: Labels | None, batch: int | None) -> Any:
        """Checked labels, or captions, on the teacher's device; None stands for no condition. See `check_labels`."""
        if class_labels is None:
            return self.backbone.null_labels(batch or 1)
        return check_labels(class_labels, batch, self.num_classes, self.device)

    def forward(self, ids_BL: Tensor, labels: Any) -> Tensor:
        """`logits` on checked labels and with gradients, for training."""
        condition = self.backbone.condition(labels)
        return self.backbone.logits(forced_hidden(self.backbone, ids_BL, condition), condition)

    @torch.no_grad()
    def log_probs(self, ids_BL: Tensor, labels: Any, recipe: Recipe) -> Tensor:
        """What `walk` hands to its `pick` on the way to these tokens, in one pass.

        Args:
            ids_BL: int64, in teacher order.
            labels: checked labels [B] (or captions) on the teacher's device.
            recipe: guidance and filtering.

        Returns:
            fp32 [B,L,V]; excluded codes are -inf.
        """
        backbone = self.backbone
        condition, weights = self.guided(labels, recipe)
        logits = backbone.logits(forced_hidden(backbone, ids_BL, condition), condition)
        if weights:
            each_L = [w for w, count in zip(weights, self.steps, strict=True) for _ in range(count)]
            logits = guide(logits, logits.new_tensor(each_L)[:, None])
        return filter_log_probs(logits, top_k=recipe.top_k, top_p=recipe.top_p)

    def guided(self, labels: Any, recipe: Recipe) -> tuple[Condition, list[float]]:
        """The condition of a pass, and what `guide` weighs each AR step by.

        Where the recipe guides, the condition is of 2 B samples, the second half without their labels; elsewhere of B,
        and there are no weights.
        """
        backbone = self.backbone
        weights = [backbone.guidance_weight(recipe.guidance_scale, k) for k in range(len(self.steps))]
        condition = backbone.condition(labels)
        if not any(w > 0 for w in weights):
            return condition, []
        return Condition.joined(condition, backbone.condition(backbone.unconditional(labels))), weights

    def generate(
        self,
        class_labels: Labels | None,
        *,
        guidance_scale: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Plain AR sampling.

        Args:
            class_labels: int, list or LongTensor [B], or captions `(features [B,P,E], mask [B,P])`; None is one sample
                without condition.
            guidance_scale: upstream's number (LlamaGen <= 1 and VAR 0 are off).
            top_k: 0 is off, 1 is greedy.
            top_p: 1.0 is off.
            generator: one `torch.Generator`, a list of B, or None for torch's global one.

        Returns:
            ids int64 [B,L] in teacher order. Sample i depends on its own random numbers alone.

        Raises:
            ValueError: a label or an option is out of range.
        """
        check_finite("temperature", temperature)
        if temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"temperature must be at least {LOWEST_TEMPERATURE}, got {temperature}; top_k=1 is greedy")
        labels = self.labels(class_labels, None)
        recipe = Recipe(guidance_scale=guidance_scale, top_k=top_k, top_p=top_p)
        if top_k == 1:
            return self.walk(labels, argmax, recipe, temperature=temperature)
        uniforms_BL = draw_uniforms(generator, batch_size(labels), self.length)
        return self.walk(labels, inverse_cdf(uniforms_BL), recipe, temperature=temperature)

    @torch.no_grad()
    def walk(
        self,
        labels: Any,
        pick: Pick,
        recipe: Recipe,
        *,
        temperature: float = 1.0,
        resolved_BN: Tensor | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """The AR loop: emit tokens step by step, conditioned on all emitted before.

        Args:
            labels: checked labels [B] (or captions) on the teacher's device.
            pick: turns log-probabilities into tokens.
            recipe: guidance and filtering.
            resolved_BN: ids of the tokens already emitted (N a step boundary); None is none.
            stop: stop after so many tokens (a step boundary); None is L.

        Returns:
            ids int64 [B,stop], the resolved ones included.

        Raises:
            ValueError: the network overflows, so that its logits say nothing.
        """
        backbone, largest_N = self.backbone, [torch.zeros(1, device=self.device)]
        begin = 0 if resolved_BN is None else resolved_BN.shape[1]
        first, last = self.step_at(begin), self.step_at(self.length if stop is None else stop)
        condition, weights = self.guided(labels, recipe)

        def read(hidden_BND: Tensor, step: int, start: int) -> Tensor:
            logits = backbone.logits(hidden_BND, condition)
            if weights:
                logits = guide(logits, weights[step])
            log_probs = filter_log_probs(logits, temperature=temperature, top_k=recipe.top_k, top_p=recipe.top_p)
            largest_N.append(log_probs.flatten().max(0, keepdim=True).values)  # not a number where any is none
            return pick(log_probs, start)

        steps, copies = range(first, last), 2 if weights else 1
        ids = unroll(backbone, condition, read, steps=steps, copies=copies, resolved_BN=resolved_BN)
        check_logits(torch.stack(largest_N))  # at once, for a look at each would hold up the device
        return ids

    def step_at(self, position: int) -> int:
        """The AR step that begins at a token position; L gives the number of steps.

        Raises:
            ValueError: the position is no step boundary.
        """
        boundaries = [0, *accumulate(self.steps)]
        if position not in boundaries:
            raise ValueError(f"{position} is no step boundary of this teacher; those are {boundaries}")
        return boundaries.index(position)


@torch.no_grad()
def unroll(
    backbone: Backbone,
    condition: Condition,
    read: Read,
    *,
    steps: range | None = None,
    copies: int = 1,
    resolved_BN: Tensor | None = None,
) -> Tensor:
    """The AR loop, whatever reads tokens off the hidden states.

    Args:
        condition: of B samples, or of `copies` batches of B one after the other, which read the same tokens.
        read: see `Read`.
        steps: the AR steps to go through; None is all.
        resolved_BN: ids of the tokens before them; None is none.

    Returns:
        ids int64 [B,N] up to the last of these steps, the resolved ones included.
    """
    steps = range(len(backbone.steps)) if steps is None else steps
    inputs, batch = condition.prefix_BPD, len(condition.prefix_BPD) // copies
    cache = backbone.new_cache(len(inputs))
    ids_BN = torch.empty(batch, sum(backbone.steps[: steps.stop]), dtype=torch.int64, device=inputs.device)
    done, seen = 0, 0
    if resolved_BN is not None and (done := resolved_BN.shape[1]):
        ids_BN[:, :done] = resolved_BN
        known = backbone.token_inputs(ids_BN[:, :done])
        seen = known.shape[1]
        inputs = torch.cat([inputs, known.repeat(copies, 1, 1)], 1)
    for step in steps:
        count = backbone.steps[step]
        hidden = backbone.hidden(inputs, condition, cache=cache)
        ids_BN[:, done : done + count] = read(hidden[:, -count:], step, done)
        done += count
        if step + 1 < steps.stop:
            known = backbone.token_inputs(ids_BN[:, :done], seen)
            seen += known.shape[1]
            inputs = known.repeat(copies, 1, 1)
    return ids_BN


def forced_hidden(backbone: Backbone, ids_BL: Tensor, condition: Condition) -> Tensor:
    """Teacher forcing in one pass: hidden states [B,L,D] at the positions where the tokens are predicted.

    The condition may hold several batches one after the other (`Condition.joined`), which read the same tokens.
    """
    length = ids_BL.shape[1]
    known_BMD = backbone.token_inputs(ids_BL[:, : length - backbone.steps[-1]])
    copies = len(condition.prefix_BPD) // len(ids_BL)
    inputs_BND = torch.cat([condition.prefix_BPD, known_BMD.repeat(copies, 1, 1)], 1)
    return backbone.hidden(inputs_BND, condition)[:, -length:]


def batch_size(labels: Any) -> int:
    return len(labels[0]) if isinstance(labels, tuple) else len(labels)
