"""Walking a teacher along a noise sequence: noise-token pairs.

B batch, L token positions, C code width.
"""

from torch import Tensor

from ddecode.arguments import check_kind, check_vectors
from ddecode.flow import FlowGrid, flow_grid, noise_to_tokens
from ddecode.teacher import Pick, Recipe, Teacher
from ddecode.types import Labels

NUM_STEPS = 16
"""Evaluations of the map, where nothing else is said."""


def flow_pick(noise_BLC: Tensor, codebook_VC: Tensor, grid: FlowGrid) -> Pick:
    """A `pick` that sends each position's own noise through the noise-to-token map."""

    def pick(log_probs_BNV: Tensor, start: int) -> Tensor:
        noise = noise_BLC[:, start : start + log_probs_BNV.shape[1]]
        return noise_to_tokens(noise, log_probs_BNV, codebook_VC, grid=grid)

    return pick


class MappedTeacher(Teacher):
    """A teacher whose tokens come from its noise by the map instead of at random: what its student is to learn.

    Args:
        teacher: shares all that it has.
        num_steps: evaluations of the map at each position.
    """

    def __init__(self, teacher: Teacher, *, num_steps: int = NUM_STEPS) -> None:
        vars(self).update(vars(teacher))
        self.num_steps = num_steps

    def pick(self, noise_BLC: Tensor) -> Pick:
        return flow_pick(noise_BLC, self.codebook_VC, flow_grid(self.codebook_VC, self.num_steps))


def resolve(
    teacher: Teacher,
    noise_BLC: Tensor,
    class_labels: Labels | None,
    *,
    guidance_scale: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_steps: int = NUM_STEPS,
) -> Tensor:
    """The token sequence that belongs to a noise sequence (DD1, arXiv 2412.17153, algorithm 1).

    Positions are resolved in teacher order, each from its own noise under the teacher's guided and filtered
    probabilities given the tokens resolved before it.

    Args:
        noise_BLC: standard normal float [B,L,C].
        class_labels: int, list or LongTensor [B], or captions; None is no condition.
        guidance_scale, top_k, top_p: as in `Teacher.generate`; they are baked into the pairs.
        num_steps: evaluations of the map at each position.

    Returns:
        ids int64 [B,L].

    Raises:
        ValueError: the noise has another shape than the teacher's sequences or is not finite, or an option is out of
            range.
    """
    check_kind("teacher", teacher, Teacher)
    check_vectors("noise", noise_BLC, teacher.length, teacher.codebook_VC.shape[1])
    labels = teacher.labels(class_labels, len(noise_BLC))
    recipe = Recipe(guidance_scale=guidance_scale, top_k=top_k, top_p=top_p)
    grid = flow_grid(teacher.codebook_VC, num_steps)
    return teacher.walk(labels, flow_pick(noise_BLC.to(teacher.device), teacher.codebook_VC, grid), recipe)
