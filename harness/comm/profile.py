"""Start-up time and time per byte of the collectives on every link level, and of a matrix product, by least squares.

``n`` bytes are one rank's buffer: what all-to-all and all-reduce send, what all-gather has gathered, what
reduce-scatter reduces (as FSMoE's cost models count, arXiv 2501.10714, section 4.1). All groups of a level work at
once, as they do in an exchange, so that ranks that share a port share it here too.
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

SIZES_BYTES = tuple(range(1 << 18, (1 << 20) + 1, 1 << 18))  # above what a link's token bucket lets through at once
GEMM_SHAPES = tuple((128 * i, 512, 512) for i in range(1, 7))  # m, k, n
WARMUPS, REPEATS = 1, 5


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


def fit(of_ranks: list[dict[str, list[list[tuple[float, float]]]]]) -> tuple[dict[str, Collective], Gemm]:
    """Fits of what ``measure`` returned on all ranks of one machine (one clock): the median over repetitions of last
    end minus first start."""
    collectives = {}
    for key in of_ranks[0]:
        if key == "gemm":
            continue
        spans = np.array([rank[key] for rank in of_ranks])  # [ranks, sizes, repeats, 2]
        times = np.median(spans[..., 1].max(0) - spans[..., 0].min(0), axis=-1)
        alpha, beta, r2 = line(SIZES_BYTES, times)
        collectives[key] = Collective(alpha_s=alpha, beta_s_per_byte=beta, r2=r2)
    spans = np.array(of_ranks[0]["gemm"])
    alpha, beta, r2 = line([m * k * n for m, k, n in GEMM_SHAPES], np.median(spans[..., 1] - spans[..., 0], axis=-1))
    return collectives, Gemm(alpha_s=alpha, beta_s_per_mac=beta, r2=r2)


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


def _gemm(m: int, k: int, n: int, device: torch.device) -> Callable[[], Any]:
    a, b = torch.ones(m, k, device=device), torch.ones(k, n, device=device)
    return lambda: a @ b


OPERATIONS = {"a2a": _all_to_all, "ag": _all_gather, "rs": _reduce_scatter, "ar": _all_reduce}


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
