"""What every backbone must be: families and toys under one contract. Try yours by adding it to `BACKBONES`.

B batch, L token positions, P condition positions, N positions of one call, D model width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    ScaleBackbone,
    make_student,
    make_teacher,
    make_tokenizer,
    make_var_student,
    make_var_teacher,
    make_var_tokenizer,
    seeded,
)
from torch import Tensor

from ddecode.types import Backbone, KeyValueCache, Tokenizer

BACKBONES: dict[str, Callable[[], Any]] = {
    "llamagen": lambda: make_teacher().backbone,
    "var": lambda: make_var_teacher().backbone,
    "toy": lambda: ScaleBackbone(0),
}
STUDENTS: dict[str, Callable[[], Any]] = {
    "llamagen": lambda: make_student(make_teacher()).backbone,
    "var": lambda: make_var_student(make_var_teacher()).backbone,
}


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Any:
    return BACKBONES[request.param]()


@pytest.fixture
def ids(backbone: Any) -> Tensor:
    return torch.randint(backbone.vocab_size, (2, sum(backbone.steps)), generator=seeded(0))


def first_step(backbone: Any, step: int) -> int:
    return sum(backbone.steps[:step])


def whole_pass(backbone: Any, ids_BL: Tensor, labels_B: Tensor) -> tuple[Tensor, Any]:
    condition = backbone.condition(labels_B)
    known_BMD = backbone.token_inputs(ids_BL[:, : first_step(backbone, len(backbone.steps) - 1)])
    return torch.cat([condition.prefix_BPD, known_BMD], 1), condition


@torch.no_grad()
def predict(backbone: Any, ids_BL: Tensor, labels_B: Tensor) -> Tensor:
    inputs_BND, condition = whole_pass(backbone, ids_BL, labels_B)
    hidden_BND = backbone.hidden(inputs_BND, condition)
    return backbone.logits(hidden_BND[:, -ids_BL.shape[1] :], condition)


@pytest.mark.parametrize("make", [*BACKBONES.values(), *STUDENTS.values()])
def test_families_and_toys_are_backbones(make: Callable[[], Any]) -> None:
    assert isinstance(make(), Backbone)


@pytest.mark.parametrize("make", [make_tokenizer, make_var_tokenizer])
def test_tokenizers_of_all_families_are_tokenizers(make: Callable[[], Any]) -> None:
    assert isinstance(make(), Tokenizer)


def test_what_lacks_a_method_is_no_backbone() -> None:
    class Half:
        steps, width, depth, vocab_size, num_classes = (1,), 4, 1, 2, 1

        def condition(self, labels: Any) -> None: ...

    assert not isinstance(Half(), Backbone)


def test_the_predictions_of_the_tokens_stand_at_the_last_positions(backbone: Any, ids: Tensor) -> None:
    labels = torch.tensor([0, 1])
    logits = predict(backbone, ids, labels)
    assert logits.shape == (*ids.shape, backbone.vocab_size) and logits.dtype == torch.float32
    for step in range(len(backbone.steps)):
        begin, end = first_step(backbone, step), first_step(backbone, step + 1)
        other = ids.clone()
        other[:, begin:end] = (other[:, begin:end] + 5) % backbone.vocab_size
        change_L = (predict(backbone, other, labels) - logits).abs().amax((0, 2))
        assert change_L[:end].max() < 1e-4, "no token is seen by its own step or an earlier one"
        assert step + 1 == len(backbone.steps) or change_L[end] > 1e-4, "the step after it sees it"


@torch.no_grad()
def test_steps_through_a_cache_equal_one_pass(backbone: Any, ids: Tensor) -> None:
    inputs_BND, condition = whole_pass(backbone, ids, torch.tensor([0, 1]))
    whole, cache, parts, seen = backbone.hidden(inputs_BND, condition), backbone.new_cache(2), [], 0
    parts.append(backbone.hidden(condition.prefix_BPD, condition, cache=cache))
    for step in range(1, len(backbone.steps)):
        known_BMD = backbone.token_inputs(ids[:, : first_step(backbone, step)], seen)
        seen += known_BMD.shape[1]
        parts.append(backbone.hidden(known_BMD, condition, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_no_condition_is_one_label_for_all(backbone: Any, ids: Tensor) -> None:
    labels = torch.tensor([0, 1])
    for null in (backbone.unconditional(labels), backbone.null_labels(2)):
        assert null.tolist() == [backbone.num_classes] * 2
    assert not torch.allclose(predict(backbone, ids, labels), predict(backbone, ids, null), atol=1e-3)


def test_a_guidance_weight_of_0_is_off(backbone: Any) -> None:
    steps = range(len(backbone.steps))
    assert not any(backbone.guidance_weight(0.0, step) for step in steps)
    weights = [backbone.guidance_weight(3.0, step) for step in steps]
    assert weights == sorted(weights) and weights[-1] > 0


def test_a_cache_holds_what_was_written_and_no_more_than_its_capacity() -> None:
    cache = KeyValueCache(1, (2, 1, 3, 4), device="cpu", dtype=torch.float32)
    keys, values = torch.randn(2, 2, 1, 2, 4, generator=seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(cache.extend(0, keys, values), (keys, values), strict=True))
    cache.length = 2
    longer, _ = cache.extend(0, keys[:, :, :1], values[:, :, :1])
    assert torch.equal(longer, torch.cat([keys, keys[:, :, :1]], 2))
    with pytest.raises(AssertionError, match="full"):
        cache.extend(0, keys, values)
