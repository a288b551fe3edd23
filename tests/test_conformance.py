"""The contract of backbones and tokenizers: families and toys keep it, and every way to break it is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    ScaleBackbone,
    ScaleTokenizer,
    make_student,
    make_teacher,
    make_tokenizer,
    make_var_student,
    make_var_teacher,
    make_var_tokenizer,
)
from torch import Tensor

from ddecode.conformance import check_backbone, check_student_backbone, check_tokenizer
from ddecode.types import Condition

BACKBONES: dict[str, Callable[[], Any]] = {
    "llamagen": lambda: make_teacher().backbone,
    "var": lambda: make_var_teacher().backbone,
    "toy": lambda: ScaleBackbone(0),
}


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_families_and_toys_are_backbones(make: Callable[[], Any]) -> None:
    check_backbone(make())


def test_their_students_are_students() -> None:
    for teacher, make in ((make_teacher(), make_student), (make_var_teacher(), make_var_student)):
        check_student_backbone(make(teacher).backbone, teacher.codebook_VC)


def test_tokenizers_of_all_families_are_tokenizers() -> None:
    check_tokenizer(make_tokenizer(), 16)
    check_tokenizer(make_var_tokenizer(), 14)


class SeesItsOwnStep(ScaleBackbone):
    def hidden(self, inputs_BND: Tensor, *args: Any, **options: Any) -> Tensor:
        return super().hidden(inputs_BND, *args, **options) + inputs_BND.mean(1, keepdim=True)


class ForgetsTokens(ScaleBackbone):
    def token_inputs(self, ids_BN: Tensor, seen: int = 0) -> Tensor:
        return torch.zeros_like(super().token_inputs(ids_BN, seen))


class LosesItsPlace(ScaleBackbone):
    def hidden(self, inputs_BND: Tensor, condition: Any, *, cache: Any = None, **options: Any) -> Tensor:
        if cache is not None and cache.length:
            inputs_BND = inputs_BND.flip(1) + self.places[0]
        return super().hidden(inputs_BND, condition, cache=cache, **options)


class HasAnotherNull(ScaleBackbone):
    def null_labels(self, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.int64)


class IgnoresLabels(ScaleBackbone):
    def condition(self, labels: Tensor) -> Condition:
        return super().condition(torch.zeros_like(labels))


class GuidesAlways(ScaleBackbone):
    def guidance_weight(self, scale: float, step: int) -> float:
        return 1.0


class IsDouble(ScaleBackbone):
    def logits(self, hidden_BND: Tensor, condition: Any) -> Tensor:
        return super().logits(hidden_BND, condition).double()


class IsEmpty(ScaleBackbone):
    steps = ()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (SeesItsOwnStep, "token 0 sees tokens of its own step or a later one"),
        (ForgetsTokens, "token 1 does not see tokens 0 to 1"),
        (LosesItsPlace, "through a cache differ"),
        (HasAnotherNull, r"null_labels must give the label 3, got \[0, 0\]"),
        (IgnoresLabels, "the label makes no difference"),
        (GuidesAlways, "guidance_weight must be 0 at scale 0"),
        (IsDouble, r"must be fp32 \[2, 8, 12\], got torch.float64"),
        (IsEmpty, "steps must be numbers of tokens"),
    ],
)
def test_a_broken_backbone_is_told_what_it_breaks(broken: type[ScaleBackbone], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_backbone(broken(0))


def test_what_lacks_members_is_told_which() -> None:
    class Half:
        steps, width, depth, vocab_size, num_classes = (1,), 4, 1, 2, 1

        def condition(self, labels: Any) -> None: ...

    with pytest.raises(ValueError, match="Half is no Backbone: it lacks guidance_weight, hidden, logits"):
        check_backbone(Half())
    with pytest.raises(ValueError, match="ScaleTokenizer is no Tokenizer: it lacks decode, encode"):
        check_tokenizer(ScaleTokenizer(0), 8)


class PixelTokenizer:
    """Codes are colours; four tokens are an image of four pixels."""

    def __init__(self) -> None:
        self.codebook_VC = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))

    def decode(self, tokens: Tensor) -> Tensor:
        colours_BLC = tokens if tokens.is_floating_point() else self.codebook_VC[tokens]
        return colours_BLC.transpose(1, 2).unflatten(2, (2, 2))

    def encode(self, images_B3HW: Tensor) -> Tensor:
        colours_BLC = images_B3HW.flatten(2).transpose(1, 2)
        return torch.cdist(colours_BLC, self.codebook_VC.expand(len(colours_BLC), -1, -1)).argmin(-1)


def test_a_broken_tokenizer_is_told_what_it_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tokenizer(PixelTokenizer(), 4)

    def refused(name: str, value: Any, message: str) -> None:
        with monkeypatch.context() as change:
            change.setattr(PixelTokenizer, name, value)
            with pytest.raises(ValueError, match=message):
                check_tokenizer(PixelTokenizer(), 4)

    decode, encode = PixelTokenizer.decode, PixelTokenizer.encode
    refused("decode", lambda self, tokens: decode(self, tokens)[:, :1], r"fp32 images \[B,3,H,W\]")
    refused("decode", lambda self, t: decode(self, t) + t.is_floating_point(), "the same images for ids and for")
    refused("encode", lambda self, x: encode(self, x).int(), r"encode must give int64 \[2, 4\], got torch.int32")
    refused("encode", lambda self, x: encode(self, x) + 6, "in no codebook")


def test_a_student_that_sees_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher()
    backbone = make_student(teacher).backbone
    own = type(backbone).vector_inputs

    def shifted(self: Any, sequence_BLC: Tensor) -> Tensor:
        return own(self, sequence_BLC.roll(-1, 1))

    with monkeypatch.context() as change:
        change.setattr(type(backbone), "vector_inputs", shifted)
        with pytest.raises(ValueError, match="tokens 0 to 1 do not all see their own"):
            check_student_backbone(backbone, teacher.codebook_VC)
        change.setattr(type(backbone), "vector_inputs", lambda self, x: own(self, x)[:, 1:])
        with pytest.raises(ValueError, match=r"vector_inputs must give \[2, 16, 32\]"):
            check_student_backbone(backbone, teacher.codebook_VC)
