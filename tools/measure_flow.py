"""Measure the noise-to-token map: accuracy, bias and time, for each number of evaluations and each choice in it.

    OMP_NUM_THREADS=1 python tools/measure_flow.py accuracy     # share equal to a 600-step reference
    OMP_NUM_THREADS=1 python tools/measure_flow.py bias         # total variation between tokens and p
    python tools/measure_flow.py teachers                       # the same in nats, of the bundled teachers' p
    OMP_NUM_THREADS=1 python tools/measure_flow.py time         # milliseconds a call

Rows: the map as it is; the same with other grid ends; two-step Adams-Bashforth in s on a log-spaced grid, and Heun in
x, as yardsticks. Bias takes quasi-random noise, which lies evenly, so that its floor is near 0.002 (0.01 for more
than four dimensions). Probabilities are the softmax of random logits whose spread is given below.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddecode import flow, load_teacher
from ddecode.flow import Codes, FlowGrid, augmented, centred, closest_spacing, flow_grid, noise_to_tokens

Solver = Callable[[Tensor, Tensor, Tensor, int], Tensor]
SETTINGS = (4, 8, 16, 32)
POSITIONS, DRAWS = 24, 8192
"""Of a bundled teacher's probabilities, and of noise for each."""


def random_rows(rows: int, V: int, spread: float) -> Tensor:
    return (spread * torch.randn(rows, V, generator=torch.Generator().manual_seed(1))).log_softmax(-1)


def gaussian(V: int, C: int) -> Tensor:
    return torch.randn(V, C, generator=torch.Generator().manual_seed(0))


def unit(V: int, C: int) -> Tensor:
    return torch.nn.functional.normalize(gaussian(V, C), dim=-1)


def clustered(clusters: int, each: int, C: int, spread: float) -> Tensor:
    codes = gaussian(clusters, C).repeat_interleave(each, 0) + spread * gaussian(clusters * each, C).flip(0)
    return torch.nn.functional.normalize(codes, dim=-1)


def ours(noise_RC: Tensor, log_p_RV: Tensor, codes_VC: Tensor, num_steps: int) -> Tensor:
    return noise_to_tokens(noise_RC[:, None], log_p_RV[:, None], codes_VC, num_steps)[:, 0]


def with_grid(factor: float, last: float) -> Solver:
    """The grid's scale times this factor, and its last s times the spacing."""

    def solver(noise_RC: Tensor, log_p_RV: Tensor, codes_VC: Tensor, num_steps: int) -> Tensor:
        grid = flow_grid(codes_VC, num_steps)
        grid = replace(grid, scale=factor * grid.scale, last=last / closest_spacing(centred(codes_VC)))
        return noise_to_tokens(noise_RC[:, None], log_p_RV[:, None], codes_VC, grid=grid)[:, 0]

    return solver


def adams_bashforth(noise_RC: Tensor, log_p_RV: Tensor, codes_VC: Tensor, num_steps: int) -> Tensor:
    codes = Codes(log_p_RA=log_p_RV, codes=augmented(centred(codes_VC)))
    z, before = noise_RC, torch.zeros_like(noise_RC)
    grid = flow_grid(codes_VC, num_steps)
    s = [0.0, *torch.logspace(math.log10(0.15 * grid.scale), math.log10(2 * grid.s[-1]), num_steps).tolist()]
    for k in range(num_steps):
        drift = codes.mean(codes.weights(z, s[k]))
        ratio = (s[k + 1] - s[k]) / (s[k] - s[k - 1]) / 2 if k else 0.0
        z, before = z + (s[k + 1] - s[k]) * ((1 + ratio) * drift - ratio * before), drift
    return codes.scores(z, s[-1]).argmax(-1)


def heun(noise_RC: Tensor, log_p_RV: Tensor, codes_VC: Tensor, num_steps: int) -> Tensor:
    codes, z = Codes(log_p_RA=log_p_RV, codes=augmented(centred(codes_VC))), noise_RC
    grid = flow_grid(codes_VC, num_steps // 2)
    for start, stop in pairwise(grid.s):
        drift = codes.mean(codes.weights(z, start))
        ahead = codes.mean(codes.weights(z + (stop - start) * drift, stop))
        z = z + (stop - start) / 2 * (drift + ahead)
    return codes.scores(z, grid.s[-1]).argmax(-1)


SOLVERS: dict[str, Solver] = {
    "the map": ours,
    "scale halved": with_grid(0.5, 8),
    "scale doubled": with_grid(2, 8),
    "last 4 / spacing": with_grid(1, 4),
    "last 8 / spacing": with_grid(1, 8),
    "last 16 / spacing": with_grid(1, 16),
    "AB2 in s, log grid": adams_bashforth,
    "Heun, same grid": heun,
}


def print_table(
    title: str, measure: Callable[[Solver, int], float], settings: tuple[int, ...] = SETTINGS, digits: int = 4
) -> None:
    print(f"\n{title}\n{'':22}" + "".join(f"{n:>9}" for n in settings))
    for name, solver in SOLVERS.items():
        print(f"{name:22}" + "".join(f"{measure(solver, n):9.{digits}f}" for n in settings), flush=True)


def accuracy() -> None:
    books = {
        "16384 x 8 unit, perplexity 800": (unit(16384, 8), random_rows(128, 16384, 2.5)),
        "4096 x 32 gaussian, perplexity 300": (gaussian(4096, 32), random_rows(256, 4096, 2.35)),
        "512 x 8 unit, perplexity 60": (unit(512, 8), random_rows(1024, 512, 2.2)),
        "512 x 8 clustered, perplexity 60": (clustered(32, 16, 8, 0.15), random_rows(1024, 512, 2.2)),
    }
    for name, (codes, log_p) in books.items():
        noise = torch.randn(len(log_p), codes.shape[1], generator=torch.Generator().manual_seed(2))
        fine = with_grid(1 / 6, 12)(noise, log_p, codes, 600)

        def share(solver: Solver, n: int, case: tuple[Tensor, ...] = (noise, log_p, codes, fine)) -> float:
            return (solver(case[0], case[1], case[2], n) == case[3]).float().mean().item()

        print_table(f"share equal to the reference: {name}", share)


def bias() -> None:
    books = {
        "5 on a line": (torch.tensor([[-1.0], [-0.9], [0.3], [0.4], [2.0]]), random_rows(1, 5, 0.5)),
        "16 x 2 gaussian": (gaussian(16, 2), random_rows(1, 16, 1.0)),
        "36 x 4 clustered": (clustered(6, 6, 4, 0.1), random_rows(1, 36, 1.0)),
        "32 x 8 unit": (unit(32, 8), random_rows(1, 32, 1.5)),
        "16 x 4 unit, top probability 0.9": (unit(16, 4), torch.tensor([[0.9] + [0.1 / 15] * 15]).log()),
    }
    for name, (codes, log_p) in books.items():
        uniform = torch.quasirandom.SobolEngine(codes.shape[1], scramble=True, seed=0).draw(1 << 14)
        noise = torch.special.ndtri(uniform.double().clamp(1e-9, 1 - 1e-9)).float()

        def distance(solver: Solver, n: int, case: tuple[Tensor, ...] = (noise, log_p, codes)) -> float:
            ids = solver(case[0], case[1].expand(len(case[0]), -1), case[2], n)
            frequency = torch.bincount(ids, minlength=len(case[2])) / len(ids)
            return 0.5 * (frequency - case[1][0].exp()).abs().sum().item()

        print_table(f"total variation: {name}", distance)


def teachers() -> None:
    """Of tokens that an evaluation or two too few send elsewhere, only what they do to frequencies counts: half of
    chi-square, which is the divergence in nats where it is small, less what it would be by chance."""
    for name in ("fashion-llamagen", "fashion-var"):
        teacher = load_teacher(name)
        recipe, labels = teacher.recipe, torch.arange(POSITIONS) % teacher.num_classes
        generator = torch.Generator().manual_seed(3)
        ids = teacher.generate(labels, guidance_scale=recipe.guidance_scale, generator=generator)
        with torch.no_grad():
            log_probs = teacher.log_probs(ids, labels, recipe)
        log_p = log_probs[range(POSITIONS), torch.randint(teacher.length, (POSITIONS,), generator=generator)]
        codes, V = teacher.codebook_VC, len(teacher.codebook_VC)
        noise = torch.randn(DRAWS, codes.shape[1], generator=generator)

        def run(solver: Solver, n: int, case: tuple[Tensor, ...] = (noise, log_p, codes)) -> Tensor:
            return torch.stack([solver(case[0], row.expand(DRAWS, -1), case[2], n) for row in case[1]])

        fine = run(with_grid(0.5, 12), 64)

        def nats(solver: Solver, n: int, case: tuple[Tensor, ...] = (fine, log_p), run: Any = run, V: int = V) -> float:
            total = 0.0
            for ours, theirs, p in zip(run(solver, n), case[0], case[1].double().exp(), strict=True):
                gone, come = (torch.bincount(ids[ours != theirs], minlength=V).double() for ids in (theirs, ours))
                total += (((come - gone).square() - come - gone) / (DRAWS**2 * p))[p * DRAWS >= 2].sum().item() / 2
            return total / POSITIONS

        print_table(f"nats a token: {name}", nats, (4, 5, 6, 8, 16), 5)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of several, which other work on the machine disturbs least."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def timing() -> None:
    cases = {
        "256 rows, 512 x 8": (256, 1, unit(512, 8), 2.2, 0),
        "64 rows, 16384 x 8, top-k 8000": (64, 1, unit(16384, 8), 2.5, 8000),
        "64 rows, 16384 x 8, top-k 1000": (64, 1, unit(16384, 8), 2.5, 1000),
        "16 x 256 rows, 4096 x 32": (16, 256, gaussian(4096, 32), 2.35, 0),
    }
    print(f"\nmilliseconds at 16 evaluations ({torch.get_num_threads()} threads)")
    for name, (B, L, codes, spread, top_k) in cases.items():
        V, C = codes.shape
        log_p = random_rows(B, V, spread)
        if top_k:
            log_p = log_p.masked_fill(log_p < log_p.topk(top_k, -1).values[:, -1:], -math.inf).log_softmax(-1)
        log_p = log_p[:, None].expand(B, L, V)
        noise = torch.randn(B, L, C, generator=torch.Generator().manual_seed(2))
        grid = flow_grid(codes, 16)
        repeats = 2 if B * L > 1000 else 15

        def call(noise: Tensor = noise, log_p: Tensor = log_p, codes: Tensor = codes, grid: FlowGrid = grid) -> None:
            noise_to_tokens(noise, log_p, codes, grid=grid)

        mapped = milliseconds(call, repeats)
        kept, flow.FEWEST_TO_GATHER = flow.FEWEST_TO_GATHER, V + 1  # no code leaves
        dense = milliseconds(call, repeats)
        flow.FEWEST_TO_GATHER = kept
        built = milliseconds(partial(flow_grid, codes, 16), 3)
        print(
            f"{name:34} the map {mapped:7.1f}   all codes to the end {dense:7.1f}   flow_grid {built:6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["accuracy", "bias", "teachers", "time"])
    {"accuracy": accuracy, "bias": bias, "teachers": teachers, "time": timing}[parser.parse_args().table]()
