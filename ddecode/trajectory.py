"""Walking a teacher along a noise sequence: noise-token pairs.

B batch, L token positions, C code width.
"""

from torch import Tensor

from ddecode.arguments import check_kind, check_vectors
from ddecode.flow import FlowGrid, flow_grid, noise_to_tokens
from ddecode.teacher import Pick, Recipe, Teacher
from ddecode.types import Labels


def flow_pick(noise_BLC: Tensor, codebook_VC: Tensor, grid: FlowGrid) -> Pick:
    """A `pick` that sends each position's own noise through the noise-to-token map."""

    def pick(log_probs_BNV: Tensor, start: int) -> Tensor:
        noise = noise_BLC[:, start : start + log_probs_BNV.shape[1]]
        return noise_to_tokens(noise, log_probs_BNV, codebook_VC, grid=grid)

    return pick


def resolve(
    teacher: Teacher,
    noise_BLC: Tensor,
    class_labels: Labels | None,
    *,
    guidance_scale: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_steps: int = 16,
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
