"""What callers hear of between the passes of a plan, and may change there."""

from typing import Any

import pytest
import torch
from tiny import C, L, seeded

from ddecode.pipeline import DistilledPipeline


def test_the_callback_sees_every_pass(pipe: DistilledPipeline) -> None:
    seen: list[tuple[int, int]] = []

    def callback(given: DistilledPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe and tensors["embeddings_BLC"].shape == (2, L, C)
        seen.append((step, timestep))
        return tensors

    options: dict[str, Any] = {"plan": "student:0-4,teacher:4-6,student:4-16", "output_type": "latent"}
    heard = pipe([0, 1], generator=seeded(0), callback_on_step_end=callback, **options).images
    assert seen == [(0, 4), (1, 5), (2, 6), (3, 16)]
    assert torch.equal(heard, pipe([0, 1], generator=seeded(0), **options).images)
    pipe([0], callback_on_step_end=lambda *given: seen.append(given[3]), callback_on_step_end_tensor_inputs=[])
    assert seen[-1] == {}


@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_callback_changes_is_gone_on_from(pipe: DistilledPipeline, in_place: bool) -> None:
    kept = pipe.student.codebook_VC[5].expand(1, 4, C)

    def callback(given: DistilledPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
        if step:
            return None
        changed = tensors["embeddings_BLC"] if in_place else tensors["embeddings_BLC"].clone()
        changed[:, :4] = kept
        return None if in_place else {"embeddings_BLC": changed}

    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "callback_on_step_end": callback}
    images = pipe([1], generator=seeded(0), **options).images
    noise = torch.randn(L, C, generator=seeded(0))[None]
    sequence = torch.cat([kept, noise[:, 4:]], 1)
    expected = pipe.student.emit(sequence, torch.tensor([1]), 4, L)
    torch.testing.assert_close(images, torch.cat([kept, expected], 1))


def test_what_the_callback_returns_stays_its_own(pipe: DistilledPipeline) -> None:
    one = pipe.student.codebook_VC[5].expand(1, L, C).clone()
    with torch.inference_mode():
        kept = one.clone()

    def callback(given: DistilledPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
        return None if step else {"embeddings_BLC": kept.expand(2, -1, -1)}

    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "callback_on_step_end": callback}
    first, second = (pipe([1, 2], generator=seeded(0), **options).images for _ in range(2))
    assert torch.equal(kept, one) and torch.equal(first, second)


def test_a_callback_of_other_tensors_is_refused(pipe: DistilledPipeline) -> None:
    with pytest.raises(ValueError, match="knows embeddings_BLC, not latents"):
        pipe(0, callback_on_step_end_tensor_inputs=["latents"])
    for returned, message in [
        ({"latents": None}, "not latents"),
        ({"embeddings_BLC": torch.zeros(1)}, r"\(1,\) for"),
        ({"embeddings_BLC": 1.0}, "no tensor but float"),
        (torch.zeros(2), "a dict of tensors or None, got Tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(0, callback_on_step_end=lambda *given, returned=returned: returned)
