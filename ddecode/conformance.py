"""What a backbone and a tokenizer have to be, as checks to run on one's own (`ddecode.types` has the protocols).

The weights must matter: trained or random ones, not a head of zeros. Everything runs on the CPU in fp32.

B batch, L token positions, N positions of one call, V codes, C code width, D model width.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from ddecode.arguments import LARGEST_SEED, check_kind, check_whole
from ddecode.types import Backbone, Condition, Tokenizer, step_ranges

BATCH = 2
FELT = 1e-4
"""Change of a logit from which on something was seen."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def check_backbone(backbone: Any, *, seed: int = 0) -> None:
    """What sampling, pairs and teacher forcing rely on.

    Args:
        backbone: a teacher's, of class labels, in evaluation mode.
        seed: of the tokens it is tried with.

    Raises:
        ValueError: it breaks the contract; the message says where.
    """
    demand_members(backbone, Backbone)
    check_whole("seed", seed, 0, LARGEST_SEED)
    steps = tuple(backbone.steps)
    demand(bool(steps) and min(steps) >= 1, f"steps must be numbers of tokens of at least 1, got {steps}")
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(backbone.vocab_size, (BATCH, sum(steps)), generator=generator)
    labels_B = torch.arange(BATCH) % backbone.num_classes
    check_predictions(backbone, ids_BL, labels_B)
    check_order(backbone, ids_BL, labels_B)
    check_cache(backbone, ids_BL, labels_B)
    check_guidance(backbone, ids_BL, labels_B)


def check_tokenizer(tokenizer: Any, length: int, *, seed: int = 0) -> None:
    """What teachers, students and pipelines rely on.

    Args:
        tokenizer: in evaluation mode.
        length: L.
        seed: of the tokens it is tried with.

    Raises:
        ValueError: it breaks the contract; the message says where.
    """
    demand_members(tokenizer, Tokenizer)
    check_whole("length", length, 1)
    check_whole("seed", seed, 0, LARGEST_SEED)
    codebook_VC = tokenizer.codebook_VC
    check_codebook(codebook_VC)
    ids_BL = torch.randint(len(codebook_VC), (BATCH, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        images, same = tokenizer.decode(ids_BL), tokenizer.decode(codebook_VC[ids_BL])
        demand(
            images.dim() == 4 and images.shape[:2] == (BATCH, 3) and images.dtype == torch.float32,
            f"decode must give fp32 images [B,3,H,W], got {images.dtype} {list(images.shape)}",
        )
        demand(close(images, same), "decode must give the same images for ids and for their rows of codebook_VC")
        found = tokenizer.encode(images)
    right = found.dtype == torch.int64 and found.shape == ids_BL.shape
    demand(right, f"encode must give int64 {list(ids_BL.shape)}, got {found.dtype} {list(found.shape)}")
    demand(int(found.min()) >= 0 and int(found.max()) < len(codebook_VC), "encode gives ids that are in no codebook")


def check_student_backbone(backbone: Any, codebook_VC: Tensor, *, seed: int = 0) -> None:
    """What a `DD1Student` relies on besides: it reads code vectors, and no position one of a later step.

    Args:
        backbone: a student's.
        codebook_VC: the tokenizer's.

    Raises:
        ValueError: it breaks the contract; the message says where.
    """
    demand_members(backbone, Backbone)
    check_codebook(codebook_VC)
    check_whole("seed", seed, 0, LARGEST_SEED)
    steps, width = tuple(backbone.steps), codebook_VC.shape[1]
    sequence_BLC = torch.randn(BATCH, sum(steps), width, generator=torch.Generator().manual_seed(seed))
    condition: Condition = backbone.condition(torch.arange(BATCH) % backbone.num_classes)
    demand(condition.class_BD is not None, "condition must give class_BD, which modulates a student's continuous head")

    def read(vectors_BLC: Tensor) -> Tensor:
        with torch.no_grad():
            inputs_BND = torch.cat([condition.prefix_BPD, backbone.vector_inputs(vectors_BLC)], 1)
            return backbone.logits(backbone.hidden(inputs_BND, condition)[:, -sum(steps) :], condition)

    expected = [BATCH, sum(steps), backbone.width]
    try:
        got = list(backbone.vector_inputs(sequence_BLC).shape)
    except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:  # a teacher's, which reads ids, say
        raise ValueError(f"vector_inputs does not take code vectors {list(sequence_BLC.shape)}") from error
    demand(got == expected, f"vector_inputs must give {expected}, one vector for each of the sequence, got {got}")
    logits_BLV = read(sequence_BLC)
    for begin, end in step_ranges(steps):
        other = sequence_BLC.clone()
        other[:, begin:end] += 1
        change_L = (read(other) - logits_BLV).abs().amax((0, 2))
        early = begin > 0 and float(change_L[:begin].max()) > FELT
        demand(not early, f"the vectors of tokens {begin} to {end} are seen by earlier ones")
        demand(float(change_L[begin:end].min()) > FELT, f"tokens {begin} to {end} do not all see their own vectors")


def check_codebook(codebook_VC: Any) -> None:
    check_kind("codebook_VC", codebook_VC, Tensor)
    demand(codebook_VC.dim() == 2 and codebook_VC.dtype == torch.float32, "codebook_VC must be fp32 [V,C]")


def demand_members(thing: Any, protocol: Any) -> None:
    names = [*getattr(protocol, "__annotations__", {}), *(n for n, _ in inspect.getmembers(protocol) if n[0] != "_")]
    missing = sorted({name for name in names if not hasattr(thing, name)})
    demand(not missing, f"{type(thing).__name__} is no {protocol.__name__}: it lacks {', '.join(missing)}")


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def whole_pass(backbone: Any, ids_BL: Tensor, labels_B: Tensor) -> tuple[Tensor, Condition]:
    """The input vectors of teacher forcing, and the condition."""
    condition = backbone.condition(labels_B)
    known_BMD = backbone.token_inputs(ids_BL[:, : ids_BL.shape[1] - backbone.steps[-1]])
    return torch.cat([condition.prefix_BPD, known_BMD], 1), condition


@torch.no_grad()
def predict(backbone: Any, ids_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Teacher forcing: logits [B,L,V]."""
    inputs_BND, condition = whole_pass(backbone, ids_BL, labels_B)
    return backbone.logits(backbone.hidden(inputs_BND, condition)[:, -ids_BL.shape[1] :], condition)


def check_predictions(backbone: Any, ids_BL: Tensor, labels_B: Tensor) -> None:
    logits = predict(backbone, ids_BL, labels_B)
    expected = (*ids_BL.shape, backbone.vocab_size)
    right = logits.shape == expected and logits.dtype == torch.float32
    demand(right, f"logits of a whole pass must be fp32 {list(expected)}, got {logits.dtype} {list(logits.shape)}")
    demand(bool(logits.isfinite().all()), "logits must be finite")


def check_order(backbone: Any, ids_BL: Tensor, labels_B: Tensor) -> None:
    """No token is seen by its own step or an earlier one; the step after it sees it."""
    logits = predict(backbone, ids_BL, labels_B)
    for begin, end in step_ranges(tuple(backbone.steps)):
        other = ids_BL.clone()
        other[:, begin:end] = (other[:, begin:end] + backbone.vocab_size // 2) % backbone.vocab_size
        change_L = (predict(backbone, other, labels_B) - logits).abs().amax((0, 2))
        seen = change_L[:end] > FELT
        where = int(seen.nonzero()[0]) if bool(seen.any()) else 0
        demand(not bool(seen.any()), f"token {where} sees tokens of its own step or a later one ({begin} to {end})")
        unseen = end < len(change_L) and float(change_L[end]) <= FELT
        demand(not unseen, f"token {end} does not see tokens {begin} to {end}, which are known by then")


@torch.no_grad()
def check_cache(backbone: Any, ids_BL: Tensor, labels_B: Tensor) -> None:
    """Steps through a cache equal one pass."""
    inputs_BND, condition = whole_pass(backbone, ids_BL, labels_B)
    whole, cache, seen = backbone.hidden(inputs_BND, condition), backbone.new_cache(BATCH), 0
    parts = [backbone.hidden(condition.prefix_BPD, condition, cache=cache)]
    for _, end in step_ranges(tuple(backbone.steps))[:-1]:
        known_BMD = backbone.token_inputs(ids_BL[:, :end], seen)
        seen += known_BMD.shape[1]
        parts.append(backbone.hidden(known_BMD, condition, cache=cache))
    demand(
        close(torch.cat(parts, 1), whole), "hidden states step by step through a cache differ from those of one pass"
    )


def check_guidance(backbone: Any, ids_BL: Tensor, labels_B: Tensor) -> None:
    """No condition is one label for all, and makes a difference; a scale of 0 is off."""
    nulls = {"unconditional": backbone.unconditional(labels_B), "null_labels": backbone.null_labels(BATCH)}
    for name, null_B in nulls.items():
        expected = [backbone.num_classes] * BATCH
        demand(null_B.tolist() == expected, f"{name} must give the label {backbone.num_classes}, got {null_B.tolist()}")
    gap = (predict(backbone, ids_BL, labels_B) - predict(backbone, ids_BL, nulls["null_labels"])).abs().max()
    demand(float(gap) > FELT, "the label makes no difference to the logits")
    weights = [backbone.guidance_weight(scale, k) for scale in (0.0, 3.0) for k in range(len(backbone.steps))]
    off = not any(weights[: len(backbone.steps)])
    demand(off and all(math.isfinite(w) and w >= 0 for w in weights), "guidance_weight must be 0 at scale 0, else >= 0")
