"""The noise-to-token map against closed forms, a plain solver without short cuts, and the distribution it must give.

R rows, V codes, C code width.
"""

import math

import pytest
import torch
from scipy.stats import binom, chisquare, kstest, norm
from torch import Tensor

from ddecode import flow
from ddecode.flow import Codes, FlowGrid, augmented, centred, flow_grid, noise_to_tokens, tokens_to_noise

SETTINGS = (8, 16, 32, 64)
FALSE_ALARM = 1e-5
"""Chance that a correct map fails one statistical test; seeds are fixed, so it is run only once per change."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_codes(V: int, C: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(V, C, generator=generator(seed)), dim=-1)


def clustered_codes(clusters: int, each: int, C: int, spread: float) -> Tensor:
    centres = torch.randn(clusters, C, generator=generator(1)).repeat_interleave(each, 0)
    return centres + spread * torch.randn(clusters * each, C, generator=generator(2))


def random_log_p(rows: int, V: int, peak: float, seed: int = 3) -> Tensor:
    return (peak * torch.randn(rows, V, generator=generator(seed))).log_softmax(-1)


def peaked_log_p(V: int, top: float) -> Tensor:
    p = torch.full((V,), (1 - top) / (V - 1))
    p[V // 2] = top
    return p.log()


def noise_RC(rows: int, C: int, seed: int = 4) -> Tensor:
    return torch.randn(rows, C, generator=generator(seed))


def tokens(noise: Tensor, log_p: Tensor, codes: Tensor, num_steps: int = 16, grid: FlowGrid | None = None) -> Tensor:
    """The map of rows: noise [R,C], log_p [V] or [R,V] to ids [R]."""
    expanded = log_p.expand(len(noise), -1)
    return noise_to_tokens(noise[:, None], expanded[:, None], codes, num_steps, grid=grid)[:, 0]


def plain_tokens(noise: Tensor, log_p: Tensor, codes: Tensor, grid: FlowGrid) -> Tensor:
    """The same solver in double precision, with all codes to the end."""
    z, codes, log_p = noise.double(), centred(codes).double(), log_p.double()
    half_norm = codes.square().sum(-1) / 2
    x = [math.asinh(s / grid.scale) for s in grid.s]

    def scores(z: Tensor, s: float) -> Tensor:
        return log_p + s * z @ codes.T - s * s * half_norm

    def lean(k: int) -> float:
        """Integral over s of (x - x_k) / (x_(k+1) - x_k), by the midpoint rule."""
        middle = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        width = x[k + 1] - x[k]
        return (middle * width * grid.scale * torch.cosh(x[k] + width * middle)).mean().item()

    before, corrected = torch.zeros_like(z), z
    for k in range(grid.num_steps):
        drift = torch.softmax(scores(z, grid.s[k]), -1) @ codes
        if k:
            corrected = corrected + (grid.s[k] - grid.s[k - 1]) * before + lean(k - 1) * (drift - before)
        slope = drift - before if k else torch.zeros_like(drift)
        z, before = corrected + (grid.s[k + 1] - grid.s[k]) * drift + lean(k) * slope, drift
    return scores(z, grid.s[-1]).argmax(-1)


def total_variation(ids: Tensor, log_p: Tensor) -> float:
    frequency = torch.bincount(ids, minlength=len(log_p)) / len(ids)
    return 0.5 * (frequency - log_p.exp()).abs().sum().item()


def total_variation_of_sampling(log_p: Tensor, n: int) -> float:
    """What n exact samples stay below but for FALSE_ALARM: the mean's bound and McDiarmid's inequality."""
    p = log_p.exp()
    mean = 0.5 * (p * (1 - p) / n).sqrt().sum().item()
    return mean + math.sqrt(-math.log(FALSE_ALARM) / (2 * n))


CODEBOOKS = {
    "unit": (unit_codes(32, 8), random_log_p(1, 32, 1.5)[0]),
    "plane": (torch.randn(16, 2, generator=generator(5)), random_log_p(1, 16, 1.0)[0]),
    "line": (torch.tensor([[-1.0], [-0.9], [0.3], [0.4], [2.0]]), torch.tensor([0.2, 0.3, 0.1, 0.3, 0.1]).log()),
    "clusters": (clustered_codes(6, 6, 4, 0.1), random_log_p(1, 36, 1.0)[0]),
    "peaked": (unit_codes(16, 4), peaked_log_p(16, 0.9)),
    "very peaked": (unit_codes(16, 4), peaked_log_p(16, 0.999)),
    "flat": (unit_codes(64, 8), torch.full((64,), 1 / 64).log()),
    "norms": (unit_codes(24, 4) * torch.linspace(0.1, 3, 24)[:, None], random_log_p(1, 24, 1.0)[0]),
    "far": (unit_codes(24, 4) + 100, random_log_p(1, 24, 1.0)[0]),
}


# ----------------------------------------------------------------------------------------------- closed forms


def test_one_code_takes_all_noise_on_a_straight_line() -> None:
    code = torch.tensor([[3.0, -2.0]])
    noise, log_p = noise_RC(50, 2), torch.zeros(50, 1)
    assert tokens(noise, log_p, code).eq(0).all()
    for s in (0.0, 0.5, 40.0):
        codes = Codes(log_p_RA=log_p, codes=augmented(code))
        drift = codes.mean(codes.weights(noise + s * code, s))
        torch.testing.assert_close(drift, code.expand(50, -1))


def test_velocity_is_that_of_rectified_flow() -> None:
    codebook, log_p, x = unit_codes(32, 8), random_log_p(20, 32, 1.0), noise_RC(20, 8)
    for time in (0.1, 0.5, 0.9):
        distance = (x[:, None] - time * codebook).square().sum(-1)
        expected = torch.softmax(log_p - distance / (2 * (1 - time) ** 2), -1) @ codebook
        codes = Codes(log_p_RA=log_p, codes=augmented(codebook))
        drift = codes.mean(codes.weights(x / (1 - time), time / (1 - time)))
        torch.testing.assert_close(drift, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("codes", "p"),
    [([-1.0, 1.0], [0.5, 0.5]), ([0.0, 5.0], [0.9, 0.1]), ([-1.0, -0.5, 0.2, 2.0], [0.1, 0.4, 0.3, 0.2])],
)
def test_one_dimension_is_the_quantile_map(codes: list[float], p: list[float]) -> None:
    noise = torch.linspace(-4, 4, 8001)[:, None]
    ids = tokens(noise, torch.tensor(p).log(), torch.tensor(codes)[:, None], 64)
    assert (ids.diff() >= 0).all()
    assert ids.unique().tolist() == list(range(len(p)))
    for j in range(len(p) - 1):
        threshold = noise[ids <= j].max().item()
        assert abs(threshold - norm.ppf(sum(p[: j + 1]))) < 0.01


def test_linear_in_x_step_integrals() -> None:
    grid = flow_grid(unit_codes(32, 8), 8)
    for k in range(8):
        s = torch.linspace(grid.s[k], grid.s[k + 1], 100001, dtype=torch.float64)
        x = torch.asinh(s / grid.scale)
        length, bend = grid.steps[k]
        assert length == pytest.approx(grid.s[k + 1] - grid.s[k])
        assert bend == pytest.approx(torch.trapezoid((x - x[0]) / (x[-1] - x[0]), s).item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("num_steps", SETTINGS)
def test_total_variation(name: str, num_steps: int) -> None:
    codes, log_p = CODEBOOKS[name]
    n = 40_000
    solver = {8: 0.04, 16: 0.01, 32: 0.003, 64: 0.001}[num_steps]
    measured = total_variation(tokens(noise_RC(n, codes.shape[1]), log_p, codes, num_steps), log_p)
    assert measured < solver + total_variation_of_sampling(log_p, n)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_chi_square_at_64(name: str) -> None:
    codes, log_p = CODEBOOKS[name]
    n = 60_000
    counts = torch.bincount(tokens(noise_RC(n, codes.shape[1], seed=11), log_p, codes, 64), minlength=len(codes))
    expected = log_p.double().softmax(-1) * n
    rare = expected < 5  # the approximation needs five expected a cell
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > FALSE_ALARM


def test_rare_codes_keep_their_share() -> None:
    """15 codes of 1e-4 in all are not lost to the leading one, at 16 evaluations."""
    codes, log_p = unit_codes(16, 4), peaked_log_p(16, 1 - 1e-4)
    n = 200_000
    rare = int((tokens(noise_RC(n, 4), log_p, codes) != 8).sum())
    low, high = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n, 1e-4)
    assert low <= rare <= high


# -------------------------------------------------------------------------------------------------- accuracy


def test_share_equal_to_a_fine_reference() -> None:
    codes, log_p = unit_codes(16384, 8), random_log_p(200, 16384, 2.5)
    perplexity = (-(log_p.exp() * log_p).sum(-1)).exp().median().item()
    assert 600 < perplexity < 1000
    noise = noise_RC(200, 8)
    fine = tokens(noise, log_p, codes, 600)
    assert (tokens(noise, log_p, codes, 16) == fine).float().mean() >= 0.94


def test_second_order() -> None:
    """In one dimension: halving the step divides the thresholds' error by about 4."""
    codes, log_p = torch.tensor([[-1.0], [0.3], [1.0]]), torch.tensor([0.2, 0.5, 0.3]).log()
    noise = torch.linspace(-2, 2, 200_001)[:, None]
    exact = norm.ppf(0.2)

    def error(num_steps: int) -> float:
        ids = tokens(noise, log_p, codes, num_steps)
        return abs(noise[ids == 0].max().item() - exact)

    errors = [error(num_steps) for num_steps in (8, 16, 32)]
    assert errors[0] / errors[2] > 9, errors  # 16 in the limit, 4 for a first-order solver


@pytest.mark.parametrize(
    ("V", "C", "peak"), [(512, 8, 1.5), (4096, 8, 4.0), (4096, 8, 1.0), (2048, 16, 6.0), (16, 2, 1.0)]
)
@pytest.mark.parametrize("num_steps", [8, 16])
def test_short_cuts_change_nothing(V: int, C: int, peak: float, num_steps: int) -> None:
    rows = 1000 if V > 1000 else 4000
    codes, log_p, noise = unit_codes(V, C), random_log_p(rows, V, peak), noise_RC(rows, C)
    grid = flow_grid(codes, num_steps)
    same = tokens(noise, log_p, codes, grid=grid) == plain_tokens(noise, log_p, codes, grid)
    assert same.float().mean() >= 0.999


def test_narrowed_codes_give_the_same_drift() -> None:
    log_p = random_log_p(40, 4096, 1.0)
    log_p[:, 100:] = -math.inf
    codes = Codes(log_p_RA=log_p, codes=augmented(unit_codes(4096, 8)))
    narrow = codes.narrowed(codes.weights(noise_RC(40, 8), 0.0))
    assert narrow.log_p_RA.shape == (40, 100)
    z = noise_RC(40, 8)
    for s in (0.0, 1.0, 20.0):
        torch.testing.assert_close(narrow.mean(narrow.weights(z, s)), codes.mean(codes.weights(z, s)))
        assert narrow.ids(narrow.scores(z, s)).equal(codes.ids(codes.scores(z, s)))


# ------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize(("V", "peak"), [(512, 1.5), (4096, 5.0)])
def test_same_noise_same_token_whatever_the_batch(V: int, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, log_p, noise = unit_codes(V, 8), random_log_p(240, V, peak), noise_RC(240, 8)
    whole = tokens(noise, log_p, codes)
    assert whole.equal(tokens(noise, log_p, codes))
    for size in (1, 7, 100):
        parts = zip(noise.split(size), log_p.split(size), strict=True)
        assert torch.cat([tokens(z, row_log_p, codes) for z, row_log_p in parts]).equal(whole)
    assert noise_to_tokens(noise.view(12, 20, 8), log_p.view(12, 20, V), codes).flatten().equal(whole)
    monkeypatch.setattr(flow, "ROWS_TIMES_CODES", 9 * V)
    assert noise_to_tokens(noise.view(12, 20, 8), log_p.view(12, 20, V), codes).flatten().equal(whole)
    assert noise_to_tokens(noise.view(80, 3, 8), log_p.view(80, 3, V), codes).flatten().equal(whole)


@pytest.mark.parametrize("factor", [1e-3, 1.0 / 3, 50.0])
def test_scaling_the_codebook_changes_nothing(factor: float) -> None:
    codes, log_p, noise = unit_codes(256, 8), random_log_p(1000, 256, 1.0), noise_RC(1000, 8)
    same = tokens(noise, log_p, codes) == tokens(noise, log_p, factor * codes)
    assert same.float().mean() >= 0.998


def test_moving_the_codebook_or_scaling_p_changes_nothing() -> None:
    codes, log_p, noise = unit_codes(256, 8), random_log_p(1000, 256, 1.0), noise_RC(1000, 8)
    ids = tokens(noise, log_p, codes)
    assert (ids == tokens(noise, log_p, codes + 5)).float().mean() >= 0.998
    assert (ids == tokens(noise, log_p + 30, codes)).float().mean() >= 0.998


def test_expanded_view_half_precision_and_given_grid() -> None:
    codes, log_p, noise = unit_codes(64, 8), random_log_p(1, 64, 1.0)[0], noise_RC(60, 8).view(10, 6, 8)
    view = log_p.expand(10, 6, 64)
    ids = noise_to_tokens(noise, view, codes)
    assert ids.shape == (10, 6) and ids.dtype == torch.int64
    assert ids.equal(noise_to_tokens(noise, view.contiguous(), codes))
    assert ids.equal(noise_to_tokens(noise, view, codes, 99, grid=flow_grid(codes, 16)))
    assert noise_to_tokens(noise.bfloat16(), view.bfloat16(), codes.bfloat16()).shape == (10, 6)
    assert view.equal(log_p.expand(10, 6, 64)), "the caller's tensors are left alone"


# ------------------------------------------------------------------------------------------------- odd inputs


@pytest.mark.parametrize("V", [40, 4096])
def test_excluded_codes_are_never_chosen(V: int) -> None:
    log_p = random_log_p(500, V, 1.0)
    kept = torch.rand(500, V, generator=generator(6)) < 0.1
    kept[:, 0] |= ~kept.any(-1)
    log_p = log_p.masked_fill(~kept, -math.inf)
    ids = tokens(noise_RC(500, 8), log_p, unit_codes(V, 8))
    assert kept.gather(1, ids[:, None]).all()


@pytest.mark.parametrize("V", [40, 4096])
def test_a_single_finite_entry_is_chosen(V: int) -> None:
    only = torch.randint(V, (100,), generator=generator(7))
    log_p = torch.full((100, V), -math.inf).scatter(1, only[:, None], -3.0)
    assert tokens(noise_RC(100, 8), log_p, unit_codes(V, 8)).equal(only)
    log_p[::2] = random_log_p(50, V, 1.0)
    assert tokens(noise_RC(100, 8), log_p, unit_codes(V, 8))[1::2].equal(only[1::2])


def test_equal_codes() -> None:
    log_p = torch.tensor([0.2, 0.3, 0.4, 0.1]).log()
    assert tokens(noise_RC(50, 3), log_p, torch.ones(4, 3)).eq(2).all()
    codes = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    ids = tokens(noise_RC(20_000, 1), log_p, codes, 32)
    assert set(ids.unique().tolist()) == {1, 2}
    assert binom.cdf(int((ids == 1).sum()), 20_000, 0.5) == pytest.approx(0.5, abs=0.5 - FALSE_ALARM)


def test_empty_batch_and_few_steps() -> None:
    codes = unit_codes(32, 8)
    assert noise_to_tokens(torch.empty(0, 3, 8), torch.empty(0, 3, 32), codes).shape == (0, 3)
    assert noise_to_tokens(torch.empty(3, 0, 8), torch.empty(3, 0, 32), codes).shape == (3, 0)
    assert noise_to_tokens(torch.empty(0, 3, 8), torch.empty(0, 3, 4096), unit_codes(4096, 8)).shape == (0, 3)
    for num_steps in (1, 2, 3, 5):
        ids = tokens(noise_RC(20, 8), random_log_p(20, 32, 1.0), codes, num_steps)
        assert ids.min() >= 0 and ids.max() < 32


def test_wrong_input_is_refused() -> None:
    noise, log_p, codes = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="noise must be"):
        noise_to_tokens(noise[0], log_p, codes)
    with pytest.raises(ValueError, match="noise must be"):
        noise_to_tokens(noise[..., :3], log_p, codes)
    with pytest.raises(ValueError, match="noise must be"):
        noise_to_tokens(noise, log_p, codes[0])
    with pytest.raises(ValueError, match="log_probs must be"):
        noise_to_tokens(noise, log_p[..., :4], codes)
    with pytest.raises(ValueError, match="log_probs must be"):
        noise_to_tokens(noise, log_p[:, :2], codes)
    with pytest.raises(ValueError, match="num_steps"):
        noise_to_tokens(noise, log_p, codes, 0)
    with pytest.raises(ValueError, match="codebook"):
        flow_grid(torch.empty(0, 4), 16)


@pytest.mark.parametrize("peak", [0.5, 3.0])
def test_noise_of_a_token_is_sent_back_to_it(peak: float) -> None:
    codes = unit_codes(64, 8)
    log_p = random_log_p(4000, 64, peak)
    ids = torch.multinomial(log_p.exp(), 1, generator=generator(5))
    fine = flow_grid(codes, 64)
    noise = tokens_to_noise(ids, log_p[:, None], codes, generator(6), grid=fine)
    back = noise_to_tokens(noise, log_p[:, None], codes, grid=fine)
    assert (back == ids).float().mean() > 0.985
    other = tokens_to_noise(ids, log_p[:, None], codes, generator(7), grid=fine)
    assert (other - noise).square().mean() > 0.1, "the same noise at each call"


@pytest.mark.parametrize("num_steps", [16, 32])
def test_noise_of_drawn_tokens_is_standard_normal_and_independent_of_p(num_steps: int) -> None:
    codes = clustered_codes(8, 4, 3, 0.2)
    log_p = random_log_p(20000, 32, 2.0)
    ids = torch.multinomial(log_p.exp(), 1, generator=generator(5))
    noise = tokens_to_noise(ids, log_p[:, None], codes, generator(6), grid=flow_grid(codes, num_steps))[:, 0]
    direction = torch.randn(3, generator=generator(8))
    along = noise @ (direction / direction.norm())
    for values in (*noise.T, along):
        assert kstest(values[:4000].numpy(), norm.cdf).pvalue > FALSE_ALARM
    assert noise.square().sum(-1).mean().item() == pytest.approx(3, abs=0.1)
    expected = log_p.exp() @ codes  # what the teacher expected must say nothing about the noise
    assert torch.corrcoef(torch.cat([noise.T, expected.T]))[:3, 3:].abs().max() < 5 / 20000**0.5


def test_noise_of_a_token_in_one_dimension_fills_its_quantiles() -> None:
    codes = torch.tensor([[-1.0], [0.5], [2.0]])
    p = torch.tensor([0.3, 0.5, 0.2])
    ids = torch.full((5000, 1), 1)
    log_p = p.log().expand(5000, 1, 3)
    noise = tokens_to_noise(ids, log_p, codes, generator(9), grid=flow_grid(codes, 64)).flatten().numpy()
    low, high = norm.ppf(0.3), norm.ppf(0.8)
    assert ((noise > low - 0.02) & (noise < high + 0.02)).mean() > 0.99
    assert kstest(norm.cdf(noise), "uniform", args=(0.3, 0.5)).pvalue > FALSE_ALARM


def test_noise_of_a_token_reaches_around_excluded_codes() -> None:
    codes = unit_codes(16, 4)
    log_p = random_log_p(50, 16, 1.0)
    log_p[:, 8:] = -math.inf
    ids = torch.multinomial(log_p.exp(), 1, generator=generator(5))
    noise = tokens_to_noise(ids, log_p[:, None], codes, generator(6), grid=flow_grid(codes, 16))
    assert bool(noise.isfinite().all())
