"""Start-up time and time per byte of the collectives on every link level, and of a matrix product, by least squares.

Two sizes are held out of every fit and say how far it can be believed between the others; a fit that explains less than
``MIN_R2`` of what was seen, or has too few points, is refused: marked, with the points beside it.
``n`` bytes are one rank's buffer: what all-to-all and all-reduce send, what all-gather has gathered, what
reduce-scatter reduces, what a rank sends to its neighbour (FSMoE counts so, arXiv 2501.10714, section 4.1).
All groups of a level work at once, as they do in an exchange, so that ranks that share a port share it here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from harness.comm.job import Job
from harness.specs import Collective, Gemm

SIZES_BYTES = tuple(i << 18 for i in (1, 2, 3, 4, 8, 12, 16))  # above what a link's token bucket lets through at once
GEMM_SHAPES = tuple((128 * i, 512, 512) for i in (1, 2, 3, 4, 6, 7, 8))  # m, k, n
HELD_OUT = (2, 5)  # indices of the sizes and shapes that no fit sees
WARMUPS, REPEATS = 1, 5
MIN_R2, MIN_POINTS = 0.9, 3


class Fit(Collective):
    """A fitted collective with what it was fitted to."""

    held_out_error: float  # largest |predicted - seen| / seen at the held-out sizes
    refused: str = ""  # why the fit is not to be used
    points: tuple[tuple[float, float], ...]  # bytes, seconds


class GemmFit(Gemm):
    """A fitted matrix product with what it was fitted to."""

    held_out_error: float
    refused: str = ""
    points: tuple[tuple[float, float], ...]  # multiply-adds, seconds


def measure(job: Job, payload: dict[str, Any]) -> dict[str, list[list[tuple[float, float]]]]:
    """Collective. On every rank: for each ``operation.scope`` and size the start and end of every repetition.

    ``payload``: ``levels``, the names of the job's link levels, outermost first; optionally ``operations``. Scopes are
    the levels (ranks with equal coordinates elsewhere) and ``flat`` (all ranks).
    """
    scopes = {name: job.rail(level) for level, name in enumerate(payload["levels"])}
    if job.num_ranks > 1:
        scopes["flat"] = job.world
    found = {}
    for scope, group in scopes.items():
        if group is None:
            continue
        for operation in payload.get("operations") or OPERATIONS:
            job.phase(f"profile {operation}.{scope}")
            runs = [OPERATIONS[operation](group, size, job.device) for size in SIZES_BYTES]
            found[f"{operation}.{scope}"] = [_timed(run, job.device, dist.barrier) for run in runs]
    job.phase("profile gemm")
    if job.rank == 0:  # alone: ranks may share cores
        found["gemm"] = [_timed(_gemm(*shape, job.device), job.device) for shape in GEMM_SHAPES]
    dist.barrier()
    return found


def fit(of_ranks: list[dict[str, list[list[tuple[float, float]]]]]) -> tuple[dict[str, Fit], GemmFit]:
    """Fits of what ``measure`` returned on all ranks of one machine (one clock): the median over repetitions of last
    end minus first start."""
    collectives = {}
    for key in of_ranks[0]:
        if key == "gemm":
            continue
        spans = np.array([rank[key] for rank in of_ranks])  # [ranks, sizes, repeats, 2]
        times = np.median(spans[..., 1].max(0) - spans[..., 0].min(0), axis=-1)
        collectives[key] = Fit(**_judged("beta_s_per_byte", SIZES_BYTES, times))
    spans = np.array(of_ranks[0]["gemm"])
    times = np.median(spans[..., 1] - spans[..., 0], axis=-1)
    return collectives, GemmFit(**_judged("beta_s_per_mac", [m * k * n for m, k, n in GEMM_SHAPES], times))


def _judged(rate: str, sizes: Any, times: Any) -> dict[str, Any]:
    """Fit all but the held-out sizes, and say how good it is: the fields of ``Fit``, ``rate`` naming the slope's."""
    sizes, times = np.asarray(sizes, dtype=np.float64), np.asarray(times, dtype=np.float64)
    held_out = np.isin(np.arange(len(sizes)), HELD_OUT)
    used = ~held_out & np.isfinite(times)
    alpha, beta, r2 = line(sizes[used], times[used]) if used.sum() >= MIN_POINTS else (0.0, 0.0, 0.0)
    refused = ""
    if used.sum() < MIN_POINTS:
        refused = f"{used.sum()} points are too few"
    elif r2 < MIN_R2:
        refused = f"r2 {r2:.3f} is below {MIN_R2}"
    errors = np.abs(alpha + beta * sizes[held_out] - times[held_out]) / times[held_out]
    return {
        "alpha_s": alpha,
        rate: beta,
        "r2": r2,
        "held_out_error": float(errors.max()),
        "refused": refused,
        "points": tuple(zip(sizes.tolist(), times.tolist(), strict=True)),
    }


def line(sizes: Any, times: Any) -> tuple[float, float, float]:
    """alpha, beta >= 0 and r2 of times = alpha + beta sizes, by least squares."""
    sizes, times = np.asarray(sizes, dtype=np.float64), np.asarray(times, dtype=np.float64)
    (alpha, scaled), residual = nnls(np.stack([np.ones(len(sizes)), sizes / sizes.max()], axis=1), times)
    spread = float(((times - times.mean()) ** 2).sum())
    return float(alpha), float(scaled / sizes.max()), 1 - residual**2 / spread if spread else 1.0


def _all_to_all(group: dist.ProcessGroup, size: int, device: torch.device) -> Callable[[], Any]:
    sent = torch.zeros(size - size % group.size(), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    return lambda: dist.all_to_all_single(received, sent, group=group)


def _all_gather(group: dist.ProcessGroup, size: int, device: torch.device) -> Callable[[], Any]:
    gathered = torch.empty(size - size % group.size(), dtype=torch.uint8, device=device)
    own = torch.zeros(len(gathered) // group.size(), dtype=torch.uint8, device=device)
    return lambda: dist.all_gather_into_tensor(gathered, own, group=group)


def _reduce_scatter(group: dist.ProcessGroup, size: int, device: torch.device) -> Callable[[], Any]:
    reduced = torch.empty(size // 4 // group.size(), dtype=torch.float32, device=device)
    buffer = torch.zeros(len(reduced) * group.size(), dtype=torch.float32, device=device)
    return lambda: dist.reduce_scatter_tensor(reduced, buffer, group=group)


def _all_reduce(group: dist.ProcessGroup, size: int, device: torch.device) -> Callable[[], Any]:
    buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)
    return lambda: dist.all_reduce(buffer, group=group)


def _send_receive(group: dist.ProcessGroup, size: int, device: torch.device) -> Callable[[], Any]:
    """To the next rank of the group and from the one before, all at once, receives posted first."""
    sent, received = torch.zeros(2, size, dtype=torch.uint8, device=device)
    here, num_ranks = dist.get_rank(group), group.size()
    following, before = ((here + step) % num_ranks for step in (1, -1))

    def run() -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.irecv, received, group=group, group_peer=before),
                dist.P2POp(dist.isend, sent, group=group, group_peer=following),
            ]
        )
        for work in works:
            work.wait()

    return run


def _gemm(m: int, k: int, n: int, device: torch.device) -> Callable[[], Any]:
    a, b = torch.ones(m, k, device=device), torch.ones(k, n, device=device)
    return lambda: a @ b


OPERATIONS = {"a2a": _all_to_all, "ag": _all_gather, "rs": _reduce_scatter, "ar": _all_reduce, "sr": _send_receive}


def _timed(
    run: Callable[[], Any], device: torch.device, meet: Callable[[], Any] = lambda: None
) -> list[tuple[float, float]]:
    spans = []
    for _ in range(WARMUPS + REPEATS):
        meet()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spans.append((start, time.perf_counter()))
    return spans[WARMUPS:]
