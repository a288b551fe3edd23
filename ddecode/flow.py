"""The noise-to-token map: rectified flow from N(0, I) to a teacher's distribution over codes, in closed form.

For one position with probabilities p_j over codes c_j, x_t = (1-t) eps + t c joins noise (flow time 0) to a code
(flow time 1). In s = t / (1-t), z = x / (1-t) the probability-flow ODE is

    dz/ds = D(z, s) = sum_j w_j c_j,    w = softmax_j( log p_j + s z.c_j - s^2 |c_j|^2 / 2 ),    z(0) = eps

(stochastic localisation; DD1, arXiv 2412.17153, section 3, gives the same flow in t). Nothing is singular, an
evaluation is one softmax between two matrix products, and the code of largest weight at the last s is the token.
Moving the codebook by m only moves z by s m, so everything below works on the centred codebook.

Over standard normal noise, w_j(z, s) is the share of token j among the rows that come through z at s. So codes may
leave before the end: the tokens' frequencies change by no more than the weight given up.

B batch, L positions, R rows (positions of all samples), V codes, A active codes, C code width.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ddecode.arguments import check_ids, check_kind, check_whole, shown
from ddecode.linear import linear
from ddecode.randomness import draw

ROWS_TIMES_CODES = 1 << 20
"""Largest number of weights held at once, unless a single row has more."""
NEGLIGIBLE = 1e-6
"""Codes that together weigh less than this take no further part in a row."""
SETTLED = 1e-5
"""A row is finished once, in the second half of the grid, all other codes together weigh less than this."""
FEW_ENOUGH_TO_SHRINK = 0.7
"""Finished rows leave once at most this share is unfinished: copying the rest costs about one evaluation."""
FEWEST_TO_AUGMENT = 1 << 16
"""With fewer weights operations cost more than their size."""
FEWEST_TO_GATHER = 2048
"""With fewer codes, giving each row its own costs more than it saves."""
GATHERED_OVER_SHARED = 1
"""Rows get codes of their own once these hold at most this many numbers per weight of the full set: then no tensor is
larger than the log-probabilities."""
SCALE_TIMES_RADIUS = 3.0
"""s at which the grid turns from even to logarithmic, for a codebook of radius and spacing 1: codes stand out there. In
a wide codebook of close neighbours it has to turn earlier: by the square root of spacing over radius."""
LAST_TIMES_SPACING = 8.0
"""Last s for a codebook of spacing 1: close neighbours are then as many standard deviations apart. Fewer than seven
evaluations are better spent before than on what hardly changes tokens; they end at one more than they are."""
MOST_STEPS = 10_000
"""16 are enough; beyond a few hundred only time changes."""


@dataclass(frozen=True, kw_only=True)
class FlowGrid:
    """Where D is evaluated: s = scale * sinh(x) at num_steps + 1 even x from 0; the token is read at the last."""

    scale: float
    last: float
    """The last s."""
    num_steps: int
    codes_XV: Tensor = field(repr=False, compare=False)
    """What D reads of the codebook: the centred codes, `augmented`, fp32."""

    @property
    def width(self) -> float:
        """Of a step in x."""
        return math.asinh(self.last / self.scale) / self.num_steps

    @cached_property
    def s(self) -> tuple[float, ...]:
        return tuple(self.scale * math.sinh(self.width * k) for k in range(self.num_steps + 1))

    @cached_property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """Integrals over s from each s_k to s_(k+1) of 1 and of (x - x_k) / (x_(k+1) - x_k)."""
        root = [math.hypot(s, self.scale) for s in self.s]
        return tuple(
            (self.s[k + 1] - self.s[k], self.s[k + 1] - (root[k + 1] - root[k]) / self.width)
            for k in range(self.num_steps)
        )


def flow_grid(codebook_VC: Tensor, num_steps: int) -> FlowGrid:
    """The grid that fits a codebook: even near 0, logarithmic beyond, until close neighbours are told apart.

    Scaling the codebook by a scales the grid by 1/a, which leaves the map unchanged.

    Args:
        codebook_VC: float [V,C].
        num_steps: evaluations of D, at least 1.

    Raises:
        ValueError: the codebook is not a finite matrix, or fewer than one evaluation.
    """
    check_whole("num_steps", num_steps, 1, MOST_STEPS)
    fits = isinstance(codebook_VC, Tensor) and codebook_VC.is_floating_point() and codebook_VC.dim() == 2
    if not fits or not codebook_VC.numel() or codebook_VC.is_meta:
        raise ValueError(f"the codebook must be floats [V, C] and not empty, got {shown(codebook_VC)}")
    if not codebook_VC.isfinite().all():
        raise ValueError("codebook must be finite, and holds NaN or infinity")
    codes = centred(codebook_VC)
    radius = codes.square().sum(-1).mean().sqrt().item()
    spacing = closest_spacing(codes)
    scale, last = 1.0, 1.0  # where all codes are one
    if math.isfinite(spacing):
        scale = SCALE_TIMES_RADIUS / radius * math.sqrt(spacing / radius)
        last = min(num_steps + 1, LAST_TIMES_SPACING) / spacing
    return FlowGrid(scale=scale, last=last, num_steps=num_steps, codes_XV=augmented(codes))


def centred(codebook_VC: Tensor) -> Tensor:
    """The codes less their mean, fp32."""
    return (codebook_VC.double() - codebook_VC.double().mean(0)).float()


def augmented(codes_VC: Tensor) -> Tensor:
    """c and, in a last row, -|c|^2 / 2, so that one product gives a score: [C+1,V]."""
    return torch.cat([codes_VC.T, -codes_VC.square().sum(-1)[None] / 2])


def closest_spacing(codes_VC: Tensor, *, quantile: float = 0.1, sample: int = 256) -> float:
    """A low quantile of the distance to the nearest distinct code, over about `sample` codes; inf if all are equal."""
    probes = codes_VC[:: max(1, len(codes_VC) // sample)]
    squared = torch.cdist(probes, codes_VC, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = torch.where(squared > 1e-10 * squared.max(), squared, math.inf).amin(-1)
    nearest = nearest[nearest.isfinite()]
    return nearest.quantile(quantile).sqrt().item() if len(nearest) else math.inf


def noise_to_tokens(
    noise_BLC: Tensor,
    log_probs_BLV: Tensor,
    codebook_VC: Tensor,
    num_steps: int = 16,
    *,
    grid: FlowGrid | None = None,
) -> Tensor:
    """Send each position's noise to a token: the same noise always to the same one, N(0, I) exactly to p as
    num_steps grows.

    Args:
        noise_BLC: standard normal float [B,L,C].
        log_probs_BLV: float [B,L,V], may be an expanded view; -inf for excluded codes, at least one per row finite;
            need not be normalised.
        codebook_VC: float [V,C]. Of codes that are equal, the most probable one is chosen.
        num_steps: evaluations of D; the final argmax is not counted.
        grid: `flow_grid(codebook_VC, num_steps)` computed before; it then says num_steps.

    Returns:
        ids int64 [B,L].

    Raises:
        ValueError: shapes do not match, or num_steps < 1; without `grid` also: numbers that have to be finite are not.
    """
    given = (noise_BLC, log_probs_BLV, codebook_VC)
    if not all(isinstance(t, Tensor) and t.is_floating_point() and not t.is_meta for t in given):
        raise ValueError(f"noise, log_probs and codebook must be float tensors, got {', '.join(map(shown, given))}")
    if noise_BLC.dim() != 3 or codebook_VC.dim() != 2 or noise_BLC.shape[2] != codebook_VC.shape[1]:
        raise ValueError(
            f"noise must be [B, L, C] and the codebook [V, C], got {tuple(noise_BLC.shape)} and "
            f"{tuple(codebook_VC.shape)}"
        )
    expected = (*noise_BLC.shape[:2], len(codebook_VC))
    if log_probs_BLV.shape != expected:
        raise ValueError(f"log_probs must be {expected}, one per code, got {tuple(log_probs_BLV.shape)}")
    if grid is None:  # a caller from outside
        grid = flow_grid(codebook_VC, num_steps)
        check_values(noise_BLC, log_probs_BLV)
    return tokens_of(noise_BLC, log_probs_BLV, grid)


def tokens_of(noise_BLC: Tensor, log_probs_BLV: Tensor, grid: FlowGrid) -> Tensor:
    """`noise_to_tokens` of the grid's codebook, on arguments that are known to fit."""
    B, L, C = noise_BLC.shape
    V = log_probs_BLV.shape[2]
    codes_XV = grid.codes_XV.to(noise_BLC.device)
    rows = max(1, ROWS_TIMES_CODES // V)
    samples = max(1, rows // max(L, 1))
    with torch.autocast(noise_BLC.device.type, enabled=False):
        if rows >= B * L:
            flat = noise_BLC.float().reshape(-1, C), log_probs_BLV.float().reshape(-1, V)
            return solve(*flat, codes_XV, grid).view(B, L)
        ids_BL = torch.empty(B, L, dtype=torch.int64, device=noise_BLC.device)
        for first in range(0, B, samples):
            for left in range(0, L, rows):
                part = slice(first, first + samples), slice(left, left + rows)
                noise_RC = noise_BLC[part].float().reshape(-1, C)
                log_p_RV = log_probs_BLV[part].float().reshape(-1, V)
                ids_BL[part] = solve(noise_RC, log_p_RV, codes_XV, grid).view_as(ids_BL[part])
    return ids_BL


def check_values(noise_BLC: Tensor, log_probs_BLV: Tensor) -> None:
    """
    Raises:
        ValueError: noise is not finite, or a row of log-probabilities holds NaN or +inf, or -inf alone.
    """
    if not noise_BLC.isfinite().all():
        raise ValueError("noise must be finite, and holds NaN or infinity")
    if not log_probs_BLV.amax(-1).isfinite().all():
        raise ValueError("log_probs must have a finite number at each position, and neither NaN nor +inf")


def solve(noise_RC: Tensor, log_p_RV: Tensor, codes_XV: Tensor, grid: FlowGrid) -> Tensor:
    """The ODE from noise to ids int64 [R], one evaluation of D a step.

    D is taken to be linear in the grid's x: extrapolated from the last two evaluations to predict the next z, then,
    with D there, interpolated to correct it (Adams-Bashforth and Adams-Moulton of second order, one evaluation for
    both). Linear in x rather than in s, the prediction stays near the codes however long the step.
    """
    codes = Codes(log_p_RA=log_p_RV, codes=codes_XV)
    half, last = grid.num_steps // 2, grid.num_steps - 1
    z_RC = corrected_RC = noise_RC
    before_RC = torch.zeros_like(noise_RC)
    ids_R = alive_R = None
    for k in range(grid.num_steps):
        weights_RA = codes.weights(z_RC, grid.s[k])
        if half < k < last - 1 and (k - half) % max(1, half // 3) == 0:
            best_R, weight_R = codes.ids(weights_RA), weights_RA.amax(-1)
            if ids_R is None or alive_R is None:
                ids_R, alive_R = best_R, torch.arange(len(best_R), device=best_R.device)
            else:
                ids_R[alive_R] = best_R
            rows = (weight_R < 1 - SETTLED).nonzero().squeeze(1)
            if len(rows) == 0:
                return ids_R
            if len(rows) < FEW_ENOUGH_TO_SHRINK * len(alive_R):
                alive_R, weights_RA, codes = alive_R[rows], weights_RA[rows], codes.of_rows(rows)
                z_RC, corrected_RC, before_RC = z_RC[rows], corrected_RC[rows], before_RC[rows]
        drift_RC = codes.mean(weights_RA)
        length, bend = grid.steps[k]
        if k == 0:
            z_RC = corrected_RC.add(drift_RC, alpha=length)
        else:
            last_length, last_bend = grid.steps[k - 1]
            corrected_RC = corrected_RC.add(before_RC, alpha=last_length - last_bend).add(drift_RC, alpha=last_bend)
            z_RC = corrected_RC.add(before_RC, alpha=-bend).add(drift_RC, alpha=length + bend)
        before_RC = drift_RC
        # hardly a code leaves in the first half, but for those that top-k or top-p excluded before it
        if k == 0 or (k >= half and k % max(1, half // 4) == 0):
            codes = codes.narrowed(weights_RA)
    best_R = codes.ids(codes.scores(z_RC, grid.s[-1]))
    if ids_R is None or alive_R is None:
        return best_R
    ids_R[alive_R] = best_R
    return ids_R


@torch.no_grad()
def tokens_to_noise(
    ids_BL: Tensor,
    log_probs_BLV: Tensor,
    codebook_VC: Tensor,
    generator: torch.Generator,
    *,
    grid: FlowGrid,
) -> Tensor:
    """Draw noise that the map sends to given tokens: the inverse of `noise_to_tokens`.

    A token's noise is not one point but a cell. Rows that end on code c stand, at the last s, at s c + eps with normal
    eps, and the ODE runs backwards as well as forwards: so it carries that normal distribution to the one over the
    cell. Tokens drawn from p get standard normal noise in this way, other noise at each call.

    Args:
        ids_BL: int64, each of finite log-probability.
        log_probs_BLV, codebook_VC, grid: as for `noise_to_tokens`.
        generator: of the CPU.

    Returns:
        fp32 [B,L,C]. `noise_to_tokens` sends nearly all rows back to their token, as many as its own number of
        evaluations allows.

    Raises:
        ValueError: an id is no code's, or shapes do not match.
    """
    check_kind("grid", grid, FlowGrid)
    V, C = codebook_VC.shape
    check_ids(ids_BL, V)
    B, L = ids_BL.shape
    if not isinstance(log_probs_BLV, Tensor) or log_probs_BLV.shape != (B, L, V):
        raise ValueError(f"log_probs must be {(B, L, V)}, one per code, got {shown(log_probs_BLV)}")
    codes_XV = grid.codes_XV.to(ids_BL.device)
    eps_BLC = draw(torch.randn, (B, L, C), generator).to(ids_BL.device)
    z_RC = (eps_BLC + grid.s[-1] * codes_XV[:-1].T[ids_BL]).view(-1, C)
    log_p_RV = log_probs_BLV.reshape(-1, V)
    rows = max(1, ROWS_TIMES_CODES // V)
    with torch.autocast(ids_BL.device.type, enabled=False):
        parts = zip(z_RC.split(rows), log_p_RV.split(rows), strict=True)
        found = [run_back(z, Codes(log_p_RA=log_p.float(), codes=codes_XV), grid) for z, log_p in parts]
        return torch.cat(found).view(B, L, C)


def run_back(z_RC: Tensor, codes: "Codes", grid: FlowGrid) -> Tensor:
    """The ODE from the last s to 0, where z is the noise; one evaluation of D a step, as in `solve`."""
    corrected_RC = z_RC
    after_RC = codes.mean(codes.weights(z_RC, grid.s[-1]))
    change_RC = torch.zeros_like(z_RC)
    for k in reversed(range(grid.num_steps)):
        length, bend = grid.steps[k]
        predicted_RC = corrected_RC - length * after_RC - (length - bend) * change_RC
        drift_RC = codes.mean(codes.weights(predicted_RC, grid.s[k]))
        change_RC = drift_RC - after_RC
        corrected_RC = corrected_RC - length * after_RC - (length - bend) * change_RC
        after_RC = drift_RC
    return corrected_RC


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The codes that take part: all of them, shared by the rows, or each row's own."""

    log_p_RA: Tensor
    codes: Tensor
    """`augmented`: [C+1,V] if shared, else [R,A,C+1]."""
    ids_RA: Tensor | None = None
    """None if shared."""

    @cached_property
    def few(self) -> bool:
        """Whether operations cost more than their size."""
        return self.ids_RA is None and self.log_p_RA.numel() < FEWEST_TO_AUGMENT

    @cached_property
    def vectors(self) -> Tensor:
        """[C,V], of shared codes."""
        return self.codes[:-1]

    def scores(self, z_RC: Tensor, s: float) -> Tensor:
        """log w up to a constant per row: [R,A]."""
        if s == 0:
            return self.log_p_RA
        if self.few:
            return torch.addmm(self.log_p_RA.add(self.codes[-1], alpha=s * s), z_RC, self.vectors, alpha=s)
        point = torch.cat([s * z_RC, z_RC.new_full((len(z_RC), 1), s * s)], -1)
        if self.ids_RA is None:
            return linear(point, self.codes.T).add_(self.log_p_RA)
        return torch.baddbmm(self.log_p_RA[:, :, None], self.codes, point[:, :, None]).squeeze(2)

    def weights(self, z_RC: Tensor, s: float) -> Tensor:
        """w: [R,A], rows sum to 1."""
        return torch.softmax(self.scores(z_RC, s), -1)

    def mean(self, weights_RA: Tensor) -> Tensor:
        """D: [R,C]."""
        if self.few:
            return torch.mm(weights_RA, self.vectors.T)
        if self.ids_RA is None:
            return linear(weights_RA, self.vectors)
        return (weights_RA[:, None] @ self.codes).squeeze(1)[:, :-1]

    def of_rows(self, rows: Tensor) -> "Codes":
        """The same for some of the rows."""
        if self.ids_RA is None:
            return Codes(log_p_RA=self.log_p_RA[rows], codes=self.codes)
        return Codes(log_p_RA=self.log_p_RA[rows], codes=self.codes[rows], ids_RA=self.ids_RA[rows])

    def ids(self, scores_RA: Tensor) -> Tensor:
        """The code of the largest score: int64 [R]."""
        best_R = scores_RA.argmax(-1)
        return best_R if self.ids_RA is None else self.ids_RA.gather(1, best_R[:, None]).squeeze(1)

    def narrowed(self, weights_RA: Tensor) -> "Codes":
        """Without the codes of negligible weight, if that leaves few enough for each row to have its own."""
        V = weights_RA.shape[1]
        if self.ids_RA is not None or V < FEWEST_TO_GATHER or not len(weights_RA):
            return self
        # 1 and 0 as fp32: torch would copy booleans to int64, twice the size of the logits, before it sums them
        active_RV = torch.gt(weights_RA, NEGLIGIBLE / V, out=torch.empty_like(weights_RA))
        count_R = active_RV.sum(-1).long()
        A = int(count_R.max())
        if A * len(self.codes) > GATHERED_OVER_SHARED * V:
            return self
        row, code = active_RV.nonzero(as_tuple=True)
        slot = torch.arange(len(row), device=row.device) - (count_R.cumsum(0) - count_R)[row]
        ids_RA = row.new_zeros(len(weights_RA), A)
        ids_RA[row, slot] = code
        log_p_RA = self.log_p_RA.new_full((len(weights_RA), A), -math.inf)
        log_p_RA[row, slot] = self.log_p_RA[row, code]
        return Codes(log_p_RA=log_p_RA, codes=self.codes.T.contiguous()[ids_RA], ids_RA=ids_RA)
