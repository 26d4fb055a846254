"""ILP 2 of MoETuner: which rank takes which cluster of each layer, so that tokens rarely cross slow links.

    min sum_l z_l   s.t.  z_l >= sum_c1,c2 C_c1,c2,l / B_g1,g2 y_c1,g1,l y_c2,g2,l+1  for each pair g1 != g2,
    y of each layer a bijection,   sum_l sum_c |c| y_c,g,l = E L / G for each g

As y is a bijection, the sum for a pair of ranks has a single term. So layers form a chain: a cost for each arrangement
(permutation) of a layer and each of the next. Up to ``MAX_EXACT`` ranks all arrangements are nodes of a layered graph,
and ILP 2 is its shortest path with one side condition, E L / G: a program whose variables are arcs (each the product of
all the y of two layers, so the tightest linearisation there is), of which those are left out that no path below the
known solution can use. Beyond, an annealed search, with a bound from each pair of layers taken alone.

Interpretations: see ``methods.moetuner.objective``; where the sizes of the clusters allow no arrangement with E L / G
experts on every rank, the fewest experts that a rank must be off are allowed (``Stage.slack``).
"""

from __future__ import annotations

import itertools
import math
import time

import numpy as np

from methods.moetuner.balance import Stage
from methods.moetuner.highs import Program
from methods.moetuner.objective import Problem, communication, crossings

MAX_EXACT = 5  # ranks: 120 arrangements of a layer
MULTIPLIER_ROUNDS = 200
MOVES_PER_RANK = 4000  # of the annealed search, for each rank of each layer


def solve(problem: Problem, clusters: np.ndarray, gap: float = 0.025, time_limit_s: float = math.inf) -> Stage:
    """Ranks for ``clusters`` int [L, E] (those of ILP 1)."""
    began = time.perf_counter()
    num_ranks, (low, high) = problem.num_ranks, problem.slots
    between = crossings(problem.profile, clusters, num_ranks)  # [L - 1, c1, c2]
    sizes = np.stack([np.bincount(row, minlength=num_ranks) for row in clusters])  # [L, G]
    if num_ranks <= MAX_EXACT:
        rank_of, bound, ended, slack = _exact(between, problem.cost, sizes, low, high, gap, time_limit_s)
    else:
        rank_of, slack = _search(between, problem.cost, sizes, low, high)
        bound = sum(pair_bound(each, problem.cost, problem.node) for each in between)
        ended = "search"
    owner = np.take_along_axis(rank_of, clusters, 1)
    value = communication(problem, owner)
    bound = min(bound, value)
    if value - bound <= gap * value + 1e-9:
        ended = "optimal"
    return Stage(owner, value, bound, ended, time.perf_counter() - began, slack)


# ----------------------------------------------------------------------------------------------------- few ranks: exact


def _exact(
    between: np.ndarray, cost: np.ndarray, sizes: np.ndarray, low: int, high: int, gap: float, time_limit_s: float
) -> tuple[np.ndarray, float, str, int]:
    """rank of each cluster int [L, G], bound, how it ended, slack."""
    began, num_ranks = time.perf_counter(), len(cost)
    ways = np.array(list(itertools.permutations(range(num_ranks))))  # [n, G]: cluster on each rank
    arcs = _arc_costs(between, cost, ways)  # [L - 1, n, n]
    held = sizes[:, ways]  # [L, n, G]: experts of each rank under each arrangement
    alike = ways[[np.array_equal(cost[np.ix_(way, way)], cost) for way in ways]]  # ranks renamed, nothing changes
    first = np.ones(len(ways), dtype=bool)
    if len(np.unique(alike[:, 0])) == num_ranks:  # symmetry: cluster 0 of layer 0 may as well go to rank 0
        first = ways[:, 0] == 0
    path, bound, feasible = _with_multipliers(arcs, held, first, low, high)
    free, slack = float(sum(arc.min() for arc in arcs)), 0
    while True:
        value = _length(arcs, path) if feasible else math.inf
        if feasible and value - bound <= gap * value + 1e-9:
            return _ranks(ways[path]), bound, "optimal", slack
        left = time_limit_s - (time.perf_counter() - began)
        if left <= 0 and feasible:
            return _ranks(ways[path]), bound, "time limit", slack
        better, least, how = _program(arcs, held, first, low - slack, high + slack, gap, left, value)
        if how == "infeasible" and not feasible:
            slack += 1
            feasible = _off(held, path, low, high) <= slack
            bound = free  # that of the multipliers was for what cannot be had
            continue
        if how == "infeasible":  # nothing is below the path that is known
            return _ranks(ways[path]), value, "optimal", slack
        if better is not None and _length(arcs, better) < value:
            path, feasible = better, True
        if not feasible:  # out of time without any solution: the nearest of those seen
            slack = _off(held, path, low, high)
        return _ranks(ways[path]), max(bound, least), how, slack


def _arc_costs(between: np.ndarray, cost: np.ndarray, ways: np.ndarray) -> np.ndarray:
    """z of every arrangement of a layer and every one of the next, float64 [L - 1, n, n]."""
    found = np.zeros((len(between), len(ways), len(ways)))
    for g1, g2 in itertools.permutations(range(len(cost)), 2):
        np.maximum(found, between[:, ways[:, g1]][:, :, ways[:, g2]] * cost[g1, g2], out=found)
    return found


def _shortest(arcs: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shortest paths with ``nodes`` [L, n] costs beside those of arcs: up to and from each node, [L, n] each (both
    with the node's own)."""
    there, back = nodes.copy(), nodes.copy()
    for layer in range(1, len(nodes)):
        there[layer] += (there[layer - 1][:, None] + arcs[layer - 1]).min(0)
    for layer in range(len(nodes) - 2, -1, -1):
        back[layer] += (arcs[layer] + back[layer + 1]).min(1)
    return there, back


def _walk(arcs: np.ndarray, nodes: np.ndarray, back: np.ndarray) -> np.ndarray:
    """A shortest path, node of each layer."""
    path = [int(back[0].argmin())]
    for layer, arc in enumerate(arcs):
        path.append(int((arc[path[-1]] + back[layer + 1]).argmin()))
    return np.array(path)


def _length(arcs: np.ndarray, path: np.ndarray) -> float:
    return float(arcs[np.arange(len(arcs)), path[:-1], path[1:]].sum())


def _off(held: np.ndarray, path: np.ndarray, low: int, high: int) -> int:
    """Experts by which the rank farthest off misses low .. high."""
    of_rank = held[np.arange(len(path)), path].sum(0)
    return int(np.maximum(low - of_rank, of_rank - high).max(initial=0))


def _with_multipliers(
    arcs: np.ndarray, held: np.ndarray, first: np.ndarray, low: int, high: int
) -> tuple[np.ndarray, float, bool]:
    """Lagrangian relaxation of the side condition by subgradients: a path (feasible if one was met, else the one
    nearest to it), the best bound, and whether the path is feasible."""
    num_layers, _, num_ranks = held.shape
    target = np.full(num_ranks, (low + high) / 2)
    half = (high - low) / 2  # ranks may hold that much more or less
    multiplier, bound = np.zeros(num_ranks), -math.inf
    best, best_value, nearest, nearest_off = None, math.inf, None, 1 << 30
    barred = np.where(first, 0.0, np.inf)
    for step in range(MULTIPLIER_ROUNDS):
        nodes = held @ multiplier
        nodes[0] += barred
        _, back = _shortest(arcs, nodes)
        bound = max(bound, float(back[0].min() - multiplier @ target - half * np.abs(multiplier).sum()))
        path = _walk(arcs, nodes, back)
        off = _off(held, path, low, high)
        value = _length(arcs, path)
        if off == 0 and value < best_value:
            best, best_value = path, value
        if off < nearest_off:
            nearest, nearest_off = path, off
        away = held[np.arange(num_layers), path].sum(0) - target
        away = np.sign(away) * np.maximum(np.abs(away) - half, 0)
        if not away.any() or best_value <= bound * (1 + 1e-9):
            break
        scale = max(value, 1.0) * 0.05 / (1 + step / 10)
        multiplier = multiplier + scale * away / (away @ away)
    if best is not None:
        return best, bound, True
    assert nearest is not None
    return nearest, bound, False


def _program(
    arcs: np.ndarray,
    held: np.ndarray,
    first: np.ndarray,
    low: int,
    high: int,
    gap: float,
    time_limit_s: float,
    start: float,
) -> tuple[np.ndarray | None, float, str]:
    """The shortest path with low .. high experts on every rank: path or None, bound, how it ended."""
    num_layers, num_nodes, num_ranks = held.shape
    nodes = np.zeros((num_layers, num_nodes))
    nodes[0] = np.where(first, 0.0, np.inf)
    there, back = _shortest(arcs, nodes)
    through = there[:-1, :, None] + arcs + back[1:, None, :]
    layer, a, b = (
        np.nonzero(through <= start * (1 + 1e-9) + 1e-9) if math.isfinite(start) else np.nonzero(np.isfinite(through))
    )
    if num_layers == 1 or not len(layer):
        return None, -math.inf, "infeasible"
    program = Program(arcs[layer, a, b], np.ones(len(layer), dtype=bool), np.ones(len(layer)))
    index = np.arange(len(layer))
    program.row(index[layer == 0], 1.0, 1, 1)
    for at in range(1, num_layers - 1):  # what comes in goes out
        into, out_of = index[layer == at - 1], index[layer == at]
        for node in np.union1d(b[into], a[out_of]):
            columns = np.concatenate([into[b[into] == node], out_of[a[out_of] == node]])
            values = np.where(layer[columns] == at - 1, 1.0, -1.0)
            program.row(columns, values, 0, 0)
    for g in range(num_ranks):
        weight = held[layer, a, g].astype(np.float64)
        last = layer == num_layers - 2
        weight[last] += held[num_layers - 1, b[last], g]
        program.row(index, weight, low, high)
    answer = program.solve(gap, time_limit_s, start)
    if answer.x is None:
        return None, answer.bound, answer.ended
    used = index[answer.x > 0.5]
    used = used[np.argsort(layer[used])]
    return np.append(a[used], b[used[-1]]), answer.bound, answer.ended


def _ranks(cluster: np.ndarray) -> np.ndarray:
    """Cluster on each rank [L, G] -> rank of each cluster."""
    return np.argsort(cluster, axis=1)


# --------------------------------------------------------------------------------------------------- many ranks: search


def _search(between: np.ndarray, cost: np.ndarray, sizes: np.ndarray, low: int, high: int) -> tuple[np.ndarray, int]:
    """rank of each cluster [L, G], slack."""
    from methods.moetuner import kernels  # numba takes its time to import

    num_layers, num_ranks = sizes.shape
    cluster = np.tile(np.arange(num_ranks), (num_layers, 1))
    typical = float((between * cost).max((1, 2)).mean()) if len(between) else 1.0
    moves = MOVES_PER_RANK * num_ranks * num_layers // max(1, num_ranks // 16) ** 2
    kernels.arrange(between, cost, sizes, cluster, low, high, typical, moves, 0.05 * typical, np.random.default_rng(0))
    held = np.bincount(cluster_ranks(cluster).ravel(), np.take_along_axis(sizes, cluster, 1).ravel(), num_ranks)
    slack = int(np.maximum(low - held, held - high).max(initial=0))
    return _ranks(cluster), slack


def cluster_ranks(cluster: np.ndarray) -> np.ndarray:
    """Rank of every entry of ``cluster`` [L, G]."""
    return np.broadcast_to(np.arange(cluster.shape[1]), cluster.shape)


def pair_bound(between: np.ndarray, cost: np.ndarray, node: np.ndarray) -> float:
    """The least z of two successive layers with clusters C [c1, c2], over all arrangements of both.

    z <= t needs: entries that cost more than t between any two ranks lie on the diagonal, so there is at most one in a
    row and in a column; and entries above t between nodes lie within a node, so clusters that such entries join are on
    one node, and these groups fit into the nodes, as many clusters of both layers in each as it has ranks. For a
    hierarchy of two levels with equal nodes that is enough too. With more levels, or other costs, the least cost
    within and between nodes still gives a lower bound."""
    off = ~np.eye(len(cost), dtype=bool)
    away = node[:, None] != node
    inside, across = cost[off & ~away], cost[away]
    near = float(inside.min()) if inside.size else math.inf
    far = float(across.min()) if across.size else 0.0
    _, ranks_of_node = np.unique(node, return_counts=True)
    levels = np.unique(np.concatenate([[0.0], between.ravel() * far, between.ravel() * (near if inside.size else 0.0)]))
    low, high = 0, len(levels) - 1  # the least level that can be kept
    while low < high:
        middle = (low + high) // 2
        if _fits(between, levels[middle], near, far, ranks_of_node):
            high = middle
        else:
            low = middle + 1
    return float(levels[low])


def _fits(between: np.ndarray, level: float, near: float, far: float, ranks_of_node: np.ndarray) -> bool:
    alone = between * min(near, far if len(ranks_of_node) > 1 else math.inf) > level * (1 + 1e-12)
    if alone.sum(0).max() > 1 or alone.sum(1).max() > 1:
        return False
    if len(ranks_of_node) < 2:
        return True
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num = len(between)
    c1, c2 = np.nonzero(between * far > level * (1 + 1e-12))
    graph = coo_array((np.ones(len(c1)), (c1, num + c2)), shape=(2 * num, 2 * num))
    count, label = connected_components(graph, directed=False)
    size = np.stack([np.bincount(label[:num], minlength=count), np.bincount(label[num:], minlength=count)], 1)
    groups = size[size.sum(1) > 1]
    most = int(ranks_of_node.max())
    if len(groups) and groups.max() > most:
        return False
    if len(ranks_of_node) > 2:
        return bool(groups.sum(0).max(initial=0) <= num)
    # two nodes: can the groups be dealt so that neither layer has more clusters on a node than it has ranks?
    reach = {(0, 0)}
    for a, b in groups.tolist():
        reach |= {(x + a, y + b) for x, y in reach if x + a <= ranks_of_node[0] and y + b <= ranks_of_node[0]}
    rest = groups.sum(0)
    return any(rest[0] - x <= ranks_of_node[1] and rest[1] - y <= ranks_of_node[1] for x, y in reach)
