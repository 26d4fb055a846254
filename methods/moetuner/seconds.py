"""Beyond the paper: experts placed by the seconds that serving them is predicted to take.

O1 counts tokens and O2 pairs of ranks. But a dispatcher brings every token home between layers, so a layer of a served
batch lasts as long as its busiest rank computes and, there and back, as its busiest port sends or gets:

    min mean_b sum_l ( s max_g T_g,l,b + 2 max_v s_v max_u max(out_u,l,b, in_u,l,b) )

with s the seconds of a row of an expert, v the levels of links, u their ports (a node's is shared by its ranks), s_v
the seconds of a row through one. The loads of a batch are not the profile's: experts that the same texts choose are
busy together, which balanced means do not show. So batches b as large as those to be served are drawn from the profile,
and the mean over them is minimised (sample average approximation), from the two stages' and the rivals' placements.

Interpretations: rates are those that the cluster states; computation is linear in rows (start-up times are the same on
all ranks, and what reading weights takes is left out); a rank's tokens are a piece of the profile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from harness.errors import bad
from harness.placing import Request
from harness.specs import DTYPE_BYTES, GEMMS

BATCHES = 64
EFFICIENCY = 0.5  # share of the peak that GEMMs reach, where a cluster states no gemm costs
MOVES, MOST_MOVES = 1000, 300_000  # of a round: for each expert of each layer, and at most
ROUNDS, WARMTHS = 4, (0.3, 0.1)


@dataclasses.dataclass(frozen=True, eq=False)
class Prices:
    """``row_s``: seconds of a row of an expert; ``port_s`` [V]: of a row through a port of each level that has a rate;
    ``unit`` int [V, G]: whose port each rank's is."""

    row_s: float
    port_s: np.ndarray
    unit: np.ndarray

    @property
    def each(self) -> np.ndarray:
        """[1 + V]."""
        return np.concatenate([[self.row_s], self.port_s])


def prices_of(request: Request) -> Prices:
    """``UserError`` where the cluster states no rate at all."""
    cluster, model, topology = request.cluster, request.model, request.topology
    macs = GEMMS[model.ffn_type] * model.hidden * model.ffn
    row_s, ports = 0.0, []
    if cluster is not None:
        if cluster.gemm is not None:
            row_s = macs * cluster.gemm.beta_s_per_mac
        elif cluster.device_flops_per_s is not None:
            row_s = 2 * macs / (EFFICIENCY * cluster.device_flops_per_s)
        row_s /= request.tensor_parallel
        row_bytes, last = model.hidden * DTYPE_BYTES[request.dtype], len(cluster.levels) - 1
        for level, link in enumerate(cluster.levels):
            if link.bandwidth_bytes_per_s is not None and topology.num_units(level) > 1:
                rate = link.bandwidth_bytes_per_s * (request.tensor_parallel if level == last else 1)
                ports.append((row_bytes / rate, topology.unit_of(level)))
    if not ports and not row_s:
        name = "none" if cluster is None else cluster.name
        raise bad("cluster", name, "states no rates to predict seconds by; choose another method, such as joint")
    unit = [of_rank for _, of_rank in ports] or [np.zeros(topology.num_ranks, dtype=np.int64)]
    return Prices(row_s, np.array([port_s for port_s, _ in ports] or [0.0]), np.stack(unit))


def batches(request: Request, prices: Prices, num_batches: int, seed: int) -> np.ndarray:
    """Rows of drawn batches, float32 [L, B, V, U, E]: from the ranks of each unit to each expert."""
    num_layers, num_tokens, _ = request.profile.shape
    num_ranks, num_experts = request.topology.num_ranks, request.model.num_experts
    counts = request.tokens or (min(request.model.seq, num_tokens),) * num_ranks
    num_units = int(prices.unit.max()) + 1
    found = np.zeros((num_layers, num_batches, len(prices.unit), num_units, num_experts), dtype=np.float32)
    rng = np.random.default_rng([seed, num_tokens])
    for batch in range(num_batches):
        starts = rng.integers(0, num_tokens, num_ranks)
        for rank, (start, count) in enumerate(zip(starts, counts, strict=True)):
            ids = request.profile[:, (start + np.arange(count)) % num_tokens].reshape(num_layers, -1)
            keys = np.arange(num_layers)[:, None] * num_experts + ids
            rows = np.bincount(keys.ravel(), minlength=num_layers * num_experts).reshape(num_layers, num_experts)
            for link, unit in enumerate(prices.unit):
                found[:, batch, link, unit[rank]] += rows
    return found


def predicted_s(prices: Prices, rows: np.ndarray, owner: np.ndarray) -> float:
    """Mean seconds of a batch that depend on the placement ``owner`` int [L, E]."""
    return _search(prices, rows, owner.copy(), 0, 0.0, 0)


def solve(request: Request, prices: Prices, starts: Iterable[np.ndarray], rounds: int) -> tuple[np.ndarray, float]:
    """The placement int [L, E] of the fewest predicted seconds that was found, from the best of ``starts``, and its
    seconds on batches that were not searched on (though of the same profile)."""
    rows = batches(request, prices, BATCHES, 0)
    found: Sequence[tuple[float, np.ndarray]] = [(predicted_s(prices, rows, owner), owner) for owner in starts]
    best, owner = min(found, key=lambda each: each[0])
    for number in range(rounds):
        request.say(f"annealing for seconds, round {number + 1} of {rounds}: {1e3 * best:.3f} ms predicted")
        tried = owner.astype(np.int64).copy()
        moves = min(MOVES * tried.size, MOST_MOVES)
        value = _search(prices, rows, tried, moves, WARMTHS[number % len(WARMTHS)], number)
        if value < best * (1 - 1e-9):
            best, owner = value, tried
    return owner, predicted_s(prices, batches(request, prices, BATCHES, 1), owner)


def _search(prices: Prices, rows: np.ndarray, owner: np.ndarray, moves: int, warmth: float, seed: int) -> float:
    """Changes ``owner``; mean seconds of a batch."""
    from methods.moetuner import busiest  # numba takes its time to import

    cost = busiest.search(
        owner.astype(np.int64, copy=False), rows, prices.unit, prices.each, moves, warmth, np.random.default_rng(seed)
    )
    assert math.isfinite(float(cost.sum()))
    return float(cost.sum(0).mean())


__all__ = ["Prices", "batches", "predicted_s", "prices_of", "solve"]
