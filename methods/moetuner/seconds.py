"""Beyond the paper: experts placed by the seconds that serving them is predicted to take.

O1 counts tokens and O2 pairs of ranks. But a dispatcher brings every token home between layers, and ranks do not wait
for each other: a rank computes as soon as its own rows are there, and sends them home as soon as it is done. So a layer
of a batch lasts until the last row is home through the ports that ranks share:

    there    a unit's ranks share its port evenly: the one with the fewest rows has them first
    experts  rank g is done s T_g seconds after its last row came
    home     a unit's port never rests while one of its ranks is done and has rows left

and min mean_b sum_l of that, over batches b as large as those to be served, drawn from the profile (sample average
approximation). Their loads are not the profile's: experts that the same texts choose are busy together, which balanced
means do not show. And equal loads are not always best: of ranks that share a port one had better be done early.

Interpretations: rates are those that the cluster states; computation is linear in rows (start-up times are the same on
all ranks, and what reading weights takes is left out); a rank's tokens are a piece of the profile; what crosses a level
loads one port there and one at each level inside it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence

import numpy as np

from harness.errors import bad
from harness.layer.work import expert_macs
from harness.placing import Request
from harness.plan.machine import lines_of_ranks
from harness.specs import DTYPE_BYTES

BATCHES = 32
EFFICIENCY = 0.5  # share of the peak that GEMMs reach, where a cluster states no gemm costs
MOVES, MOST_MOVES = 1000, 100_000  # of a round: for each expert of each layer, and at most
ROUNDS, WARMTHS = 2, (0.3, 0.1)


@dataclasses.dataclass(frozen=True, eq=False)
class Prices:
    """``each`` [1 + V]: seconds of a row of an expert, then of a row through a port of each level that has a rate;
    ``size`` int [V]: neighbouring ranks that share such a port."""

    each: np.ndarray
    size: np.ndarray


def prices_of(request: Request) -> Prices:
    """``UserError`` where the cluster states no rate at all."""
    cluster, model, topology = request.cluster, request.model, request.topology
    macs = expert_macs(model)
    row_s, ports = 0.0, []
    if cluster is not None:
        if cluster.gemm is not None:
            row_s = macs * cluster.gemm.beta_s_per_mac
        elif cluster.device_flops_per_s is not None:
            row_s = 2 * macs / (EFFICIENCY * cluster.device_flops_per_s)
        row_s /= request.tensor_parallel
        row_bytes = model.hidden * DTYPE_BYTES[request.dtype]
        for line in lines_of_ranks(cluster, topology, request.tensor_parallel):
            if (num_units := topology.num_units(line.level)) > 1:
                size = topology.num_ranks // num_units // line.ports
                ports.append((row_bytes / line.bytes_per_s, size))
    if not ports and not row_s:
        if cluster is None:
            remedy = "does not say which ranks share a port, so seconds cannot be predicted"
            raise bad("bandwidths", "a matrix", f"{remedy}; leave it out, or choose another method, such as joint")
        raise bad(
            "cluster", cluster.name, "states no rates to predict seconds by; choose another method, such as joint"
        )
    ports = ports or [(0.0, 1)]
    return Prices(np.array([row_s, *(port_s for port_s, _ in ports)]), np.array([size for _, size in ports]))


def batches(request: Request, prices: Prices, num_batches: int, seed: int) -> np.ndarray:
    """Rows of drawn batches, float32 [L, B, V, U, E]: from the ranks of each unit to each expert."""
    num_layers, num_tokens, _ = request.profile.shape
    num_ranks, num_experts = request.topology.num_ranks, request.model.num_experts
    counts = request.tokens or (min(request.model.seq, num_tokens),) * num_ranks
    num_units = num_ranks // int(prices.size.min())
    found = np.zeros((num_layers, num_batches, len(prices.size), num_units, num_experts), dtype=np.float32)
    rng = np.random.default_rng([seed, num_tokens])
    for batch in range(num_batches):
        starts = rng.integers(0, num_tokens, num_ranks)
        for rank, (start, count) in enumerate(zip(starts, counts, strict=True)):
            ids = request.profile[:, (start + np.arange(count)) % num_tokens].reshape(num_layers, -1)
            keys = np.arange(num_layers)[:, None] * num_experts + ids
            rows = np.bincount(keys.ravel(), minlength=num_layers * num_experts).reshape(num_layers, num_experts)
            for link, size in enumerate(prices.size):
                found[:, batch, link, rank // size] += rows
    return found


def predicted_s(prices: Prices, rows: np.ndarray, owner: np.ndarray) -> float:
    """Mean seconds of a batch that depend on the placement ``owner`` int [L, E]."""
    return _search(prices, rows, owner.astype(np.int64), 0, 0.0, 0)


def solve(
    request: Request, prices: Prices, starts: Iterable[np.ndarray], rounds: int, time_limit_s: float = math.inf
) -> tuple[np.ndarray, str]:
    """The placement int [L, E] of the fewest predicted seconds that was found from the best of ``starts``, and how the
    search ended: ``search`` or ``time limit``."""
    began = time.perf_counter()
    rows = batches(request, prices, BATCHES, 0)
    found: Sequence[tuple[float, np.ndarray]] = [(predicted_s(prices, rows, owner), owner) for owner in starts]
    best, owner = min(found, key=lambda each: each[0])
    for number in range(rounds):
        if time.perf_counter() - began > time_limit_s:
            return owner, "time limit"
        request.say(f"annealing for seconds, round {number + 1} of {rounds}: {1e3 * best:.3f} ms predicted")
        tried = owner.astype(np.int64).copy()
        moves = min(MOVES * tried.size, MOST_MOVES)
        value = _search(prices, rows, tried, moves, WARMTHS[number % len(WARMTHS)], number)
        if value < best * (1 - 1e-9):
            best, owner = value, tried
    return owner, "search"


def _search(prices: Prices, rows: np.ndarray, owner: np.ndarray, moves: int, warmth: float, seed: int) -> float:
    """Changes ``owner``; mean seconds of a batch."""
    from methods.moetuner import busiest  # numba takes its time to import

    assert owner.dtype == np.int64
    rng = np.random.default_rng(seed)
    return float(busiest.search(owner, rows, prices.size, prices.each, moves, warmth, rng)) / rows.shape[1]


__all__ = ["Prices", "batches", "predicted_s", "prices_of", "solve"]
