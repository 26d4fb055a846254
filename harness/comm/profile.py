"""Start-up time and time per byte of the collectives on every link level, and of matrix products, plain and grouped.

``n`` bytes are one rank's buffer: what all-to-all and all-reduce send, what all-gather has gathered, what
reduce-scatter reduces, what a rank sends to its neighbour (FSMoE counts so, arXiv 2501.10714, section 4.1).
All groups of a level work at once, as they do in an exchange, so that ranks that share a port share it here too.

Short operations are timed in trains of several, one right after the other: a token bucket lets the first bytes after a
pause through for nothing, and ranks leave a barrier some hundred microseconds apart; neither is a collective's price.

What is multiplied and sent is drawn: a GPU draws less power for equal numbers, and its clocks then rise above those of
any training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.fits import Fit, GemmFit, judge
from harness.comm.job import Job
from harness.layer.experts import grouped_mm

SIZES_KIB = (64, 96, 128, 256, 384, 512, 1024, 1536, 2048, 4096)
ROWS = (128, 256, 384, 512, 768, 896, 1024)  # of a matrix product
HELD_OUT_KIB, HELD_OUT_ROWS = (96, 384, 1536), (384, 896)  # no fit sees them
NUM_EXPERTS = 4  # of the grouped product, which share its rows evenly
#: a GPU needs larger work than a CPU core before more work takes more time
CUDA_SIZES, CUDA_ROWS = 16, 8
SIDE = {"cpu": 512, "cuda": 4096}  # k and n of the products
REPEATS = 5
TRAIN_S, MAX_TRAIN, LONG_S = 0.01, 16, 0.06
QUANTILE = 0.25  # of the repetitions: what else runs on the machine only ever adds

Work = Callable[[], Any]


def measure(job: Job, payload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Collective. On this rank, for each ``operation.scope`` and for ``gemm`` and ``grouped_gemm`` (rank 0 only): ``x``
    [sizes], ``held_out`` (indices) and ``spans`` [sizes][repeats] of (start, end, how many in the train).

    ``payload``: ``levels``, the names of the job's link levels, outermost first; for a quick look also ``operations``,
    those wanted, and ``repeats``. Scopes are
    the levels (ranks with equal coordinates elsewhere), ``flat`` (all ranks) and, with more than two levels, ``intra``
    (all ranks of a unit of the outermost).
    """
    scopes = {name: job.rail(level) for level, name in enumerate(payload["levels"])}
    if len(payload["levels"]) > 2:
        scopes["intra"] = job.inner(0)
    if job.num_ranks > 1:
        scopes["flat"] = job.world
    cuda = job.device.type == "cuda"
    sizes = [(kib << 10) * (CUDA_SIZES if cuda else 1) for kib in SIZES_KIB]
    pool = drawn_bytes(2, max(sizes), job.device)  # shared: they take turns
    held_out = [SIZES_KIB.index(kib) for kib in HELD_OUT_KIB]
    found: dict[str, dict[str, Any]] = {}
    trains: dict[str, list[Train]] = {}
    for scope, group in scopes.items():
        if group is None:
            continue
        for operation in payload.get("operations") or OPERATIONS:
            key = f"{operation}.{scope}"
            job.phase(f"profile {key}")
            found[key] = {"x": sizes, "held_out": held_out}
            works = [OPERATIONS[operation](group, *pool[:, :size]) for size in sizes]
            works[0]()  # no measure: connections are made
            trains[key] = [Train(job, work) for work in works]
    repeats = payload.get("repeats", REPEATS)
    for repeat in range(repeats):  # all take turns, so that a busy minute of the machine spoils no one operation
        for key, each in trains.items():
            job.phase(f"profile {key}, repetition {repeat}")
            each[0].work()  # no measure: the first after another operation is slow
            for train in each:
                train.run(repeat)
    for key, each in trains.items():
        found[key]["spans"] = [train.spans for train in each]
    job.phase("profile gemm")
    if job.rank == 0:
        found |= _products(job, repeats)
    if job.num_ranks > 1:
        dist.barrier()
    return found


def _products(job: Job, repeats: int) -> dict[str, dict[str, Any]]:
    """Of this rank alone, as ranks may share cores."""
    rows = [count * (CUDA_ROWS if job.device.type == "cuda" else 1) for count in ROWS]
    side, held_out = SIDE[job.device.type], [ROWS.index(count) for count in HELD_OUT_ROWS]
    found: dict[str, dict[str, Any]] = {}
    for name, make in {"gemm": gemm, "grouped_gemm": _grouped_gemm}.items():
        works = [make(count, side, job.device) for count in rows]
        works[-1]()
        trains = [Train(job, work, together=False) for work in works]
        for repeat in range(repeats):
            for train in trains:
                train.run(repeat)
        found[name] = {"x": [count * side**2 for count in rows], "held_out": held_out, "dtype": str(_dtype(job.device))}
        found[name]["spans"] = [train.spans for train in trains]
    return found


def fit(of_ranks: list[dict[str, dict[str, Any]]]) -> tuple[dict[str, Fit], dict[str, GemmFit]]:
    """Fits by ``operation.scope``, and of ``gemm`` and ``grouped_gemm``, of what ``measure`` returned on all ranks of
    one machine (one clock): the lower quartile over repetitions of last end minus first start."""
    collectives, products = {}, {}
    for key, own in of_ranks[0].items():
        times = [
            _seconds([rank[key]["spans"][which] for rank in of_ranks if key in rank]) for which in range(len(own["x"]))
        ]
        if "dtype" in own:
            products[key] = judge(GemmFit, own["x"], times, own["held_out"], dtype=own["dtype"].removeprefix("torch."))
        else:
            collectives[key] = judge(Fit, own["x"], times, own["held_out"])
    return collectives, products


def _seconds(spans: list[list[tuple[float, float, int]]]) -> float:
    """Of one operation, from the spans of all ranks [ranks, repeats, 3]."""
    start, end, length = np.moveaxis(np.array(spans), -1, 0)
    return float(np.quantile((end.max(0) - start.min(0)) / length[0], QUANTILE))


class Train:
    """Runs ``work`` several times in a row, about ``TRAIN_S`` long. ``together``: on all ranks at once (collective, and
    the same number on each); else on this one alone."""

    def __init__(self, job: Job, work: Work, together: bool = True):
        self.job, self.work, self.together = job, work, together and job.num_ranks > 1
        self.spans: list[tuple[float, float, int]] = []  # start, end, how many
        self.length = 1
        tries = [self._span() for _ in range(2)]  # the first may meet cold caches and unmapped pages
        took = torch.tensor([end - start for start, end, _ in tries], dtype=torch.float64, device=job.device)
        if self.together:
            dist.all_reduce(took, dist.ReduceOp.MAX)
        self.took_s = float(took.min())
        self.length = min(MAX_TRAIN, max(1, math.ceil(TRAIN_S / self.took_s)))
        if self.length == 1:
            self.spans.append(tries[-1])

    def run(self, repeat: int) -> None:
        """Short work thrice, as it is disturbed the most and costs the least; long work every third time."""
        count = 3 if self.length > 1 else 1 if self.took_s < LONG_S else int(repeat % 3 == 0)
        self.spans += [self._span() for _ in range(count)]

    def _span(self) -> tuple[float, float, int]:
        if self.together:
            dist.barrier()
        self._settle()
        start = time.perf_counter()
        for _ in range(self.length):
            self.work()
        self._settle()
        return start, time.perf_counter(), self.length

    def _settle(self) -> None:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize(self.job.device)


def _all_to_all(group: dist.ProcessGroup, one: torch.Tensor, other: torch.Tensor) -> Work:
    used = len(one) - len(one) % group.size()
    return lambda: dist.all_to_all_single(other[:used], one[:used], group=group)


def _all_gather(group: dist.ProcessGroup, one: torch.Tensor, other: torch.Tensor) -> Work:
    share = len(one) // group.size()
    return lambda: dist.all_gather_into_tensor(other[: share * group.size()], one[:share], group=group)


def _reduce_scatter(group: dist.ProcessGroup, one: torch.Tensor, other: torch.Tensor) -> Work:
    share = len(one) // 4 // group.size()
    buffer, reduced = one.view(torch.float32)[: share * group.size()], other.view(torch.float32)[:share]
    return lambda: dist.reduce_scatter_tensor(reduced, buffer, group=group)


def _all_reduce(group: dist.ProcessGroup, one: torch.Tensor, other: torch.Tensor) -> Work:
    buffer = one.view(torch.float32)
    # Sums of sums would soon be infinite, all of them alike; gloo has no means, and a processor does not mind.
    how = dist.ReduceOp.AVG if dist.get_backend(group) == "nccl" else dist.ReduceOp.SUM
    return lambda: dist.all_reduce(buffer, how, group=group)


def _send_receive(group: dist.ProcessGroup, one: torch.Tensor, other: torch.Tensor) -> Work:
    """To the next rank of the group and from the one before, all at once, receives posted first."""
    here, num_ranks = dist.get_rank(group), group.size()
    following, before = ((here + step) % num_ranks for step in (1, -1))

    def run() -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.irecv, other, group=group, group_peer=before),
                dist.P2POp(dist.isend, one, group=group, group_peer=following),
            ]
        )
        for work in works:
            work.wait()

    return run


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def drawn(*shape: int, device: torch.device) -> torch.Tensor:
    """Normal numbers, in the format that products are measured in."""
    return torch.randn(*shape, device=device, dtype=_dtype(device))


def drawn_bytes(count: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """[count, num_bytes] of normal float32 numbers, so that what adds them meets no other numbers than usual."""
    return torch.randn(count, num_bytes // 4, device=device).view(torch.uint8)


def gemm(rows: int, side: int, device: torch.device) -> Work:
    """[rows, side] @ [side, side]."""
    a, b = drawn(rows, side, device=device), drawn(side, side, device=device)
    return lambda: a @ b


def _grouped_gemm(rows: int, side: int, device: torch.device) -> Work:
    x, w = drawn(rows, side, device=device), drawn(NUM_EXPERTS, side, side, device=device)
    counts = torch.full((NUM_EXPERTS,), rows // NUM_EXPERTS)
    return lambda: grouped_mm(x, (w,), counts)


OPERATIONS = {"a2a": _all_to_all, "ag": _all_gather, "rs": _reduce_scatter, "ar": _all_reduce, "sr": _send_receive}

__all__ = ["OPERATIONS", "fit", "gemm", "measure"]
