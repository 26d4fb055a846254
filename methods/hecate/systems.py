"""Hecate and the systems that it is compared with, simulated over the same loads (``methods.hecate.simulate``).

A system sees the loads of the steps before a step (FasterMoE and calibration: its own, after the gate). Placements that
change between steps (SmartMoE's, FlexMoE's, an EPLB-like one, Hecate's re-sharding) take their moves, with
optimizer state, on the critical path; interpretation: all rearrange every 25 steps, where Hecate's paper sees the
best, and those with copies keep them in twice the slots that experts need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from baselines import eplb, fastermoe, flexmoe
from baselines.smartmoe import greedy
from harness.placement import Placement
from harness.plan.cost import Even
from methods.hecate.loads import predicted
from methods.hecate.materialise import materialise
from methods.hecate.memory_model import Copies
from methods.hecate.shard import shard
from methods.hecate.simulate import (
    Array,
    Result,
    Setup,
    all_reduce_s,
    arrivals,
    exchange_s,
    experts_s,
    move_s,
    result,
    sparse_s,
)

WARM = 25  # steps before those that count
FIRST = 5  # the step before which a placement first follows the loads
REARRANGE_EVERY, RESHARD_EVERY, WINDOW = 25, 100, 5


@dataclasses.dataclass(frozen=True)
class Options:
    """``every``: steps between rearrangements; ``slots``: of a rank, over E / W. Of Hecate: ``m`` copies of a layer on
    a device (None: as many as t), ``reshard_every`` (0: never), ``materialises`` (False: sharding alone)."""

    every: int = REARRANGE_EVERY
    slots: int = 2
    m: int | None = None
    t: int | None = None
    reshard_every: int = RESHARD_EVERY
    materialises: bool = True
    remat: bool = False
    calibrates: bool = False


def ep(setup: Setup, loads: Array, options: Options) -> Result:
    """Expert parallelism: contiguous experts, nothing moves."""
    owners = contiguous(setup)
    return result(setup, arrivals(loads[WARM:], owners, setup.num_nodes), _owned(setup))


def fsdp(setup: Setup, loads: Array, options: Options) -> Result:
    """All experts gathered in forward and in backward, all gradients reduced; under the attention as far as it goes."""
    num_experts, num_ranks = setup.model.num_experts, setup.cluster.num_ranks
    one_s = float(setup.links.seconds(Even("ag", "flat", num_experts * setup.expert_bytes)))
    rows = arrivals(loads[WARM:], np.ones((num_experts, num_ranks), dtype=bool), setup.num_nodes)
    copies = Copies(_owned(setup).owned, resident=num_experts, widest=num_experts)
    gather = np.maximum(0, one_s - setup.attention_s)
    reduce = np.maximum(0, 2 * one_s - 2 * setup.attention_s)
    return result(setup, rows, copies, gather=gather, reduce=reduce, collectives=3 * one_s)


def faster(setup: Setup, loads: Array, options: Options) -> Result:
    """FasterMoE: shadows after every gate, on the critical path, and the smart schedule."""
    loads = loads[WARM:]
    owners = contiguous(setup)
    model = fastermoe.LatencyModel(
        setup.model.hidden,
        setup.model.ffn,
        setup.flops_per_s,
        setup.node_bytes_per_s * setup.num_nodes / setup.cluster.num_ranks,
    )
    owner = owners.argmax(1)
    shadows = np.stack([fastermoe.shadowed(loads[:, i], owner, model) for i in range(loads.shape[1])], axis=1)
    hosts = owners | shadows[..., None]
    rows = arrivals(loads, hosts, setup.num_nodes)
    of_shadows = (loads * shadows[..., None, :]).sum(-1)
    rest_s = (rows.sum(-2) - of_shadows).max(-1) * setup.assignment_s
    shadows_s = of_shadows.max(-1) * setup.assignment_s
    way_s, weights_s = exchange_s(setup, rows), sparse_s(setup, owners, hosts)
    fused = sum(
        fastermoe.smart_schedule_s(way_s, n * rest_s, way_s, weights_s=weights_s, shadows_s=n * shadows_s)
        for n in (1, 2)
    )
    copies = _with_copies(setup, hosts, owners)
    return result(setup, rows, copies, fused=np.asarray(fused), collectives=2 * weights_s)


def smart(setup: Setup, loads: Array, options: Options) -> Result:
    """SmartMoE's greedy placement."""
    start = Placement.contiguous(setup.model.num_experts, setup.cluster.num_ranks)
    placements = [start] * loads.shape[1]

    def rearrange(load: Array) -> Array:
        placements[:] = [greedy(own, placement) for own, placement in zip(load, placements, strict=True)]
        return np.stack([placement.hosts for placement in placements])

    hosts, moves = _rearranged(setup, loads, options.every, np.stack([start.hosts] * len(placements)), rearrange)
    rows = arrivals(loads[WARM:], hosts, setup.num_nodes)
    return result(setup, rows, _owned(setup), move=moves)


def flex(setup: Setup, loads: Array, options: Options) -> Result:
    """FlexMoE's copies."""
    num_experts, num_ranks = setup.model.num_experts, setup.cluster.num_ranks
    port = setup.node_bytes_per_s * setup.num_nodes / num_ranks
    costs = flexmoe.Costs(
        3 * setup.assignment_s + 4 * setup.row_bytes / port, setup.expert_bytes / port, setup.move_bytes / port
    )
    slots = [flexmoe.start(num_experts, num_ranks, _slots(setup, options))] * loads.shape[1]

    def rearrange(load: Array) -> Array:
        slots[:] = [
            flexmoe.adjust(own, each, costs, steps=options.every).slots for own, each in zip(load, slots, strict=True)
        ]
        return np.stack([flexmoe.hosts_of(each, num_experts) for each in slots])

    return _copied(setup, loads, options, rearrange)


def eplb_like(setup: Setup, loads: Array, options: Options) -> Result:
    """Copies as an EPLB-like planner places them."""
    inner = setup.cluster.num_ranks // setup.num_nodes

    def rearrange(load: Array) -> Array:
        slots = [eplb.balance(own, setup.num_nodes, inner, _slots(setup, options)) for own in load]
        return np.stack([flexmoe.hosts_of(each, setup.model.num_experts) for each in slots])

    return _copied(setup, loads, options, rearrange)


def hecate(setup: Setup, loads: Array, options: Options) -> Result:
    """FSSDP: Algorithm 2 every ``reshard_every`` steps, Algorithm 1 at every step."""
    num_layers, num_experts, num_ranks = loads.shape[1], setup.model.num_experts, setup.cluster.num_ranks
    expected = predicted(loads, WINDOW)
    t = setup.overlap_degree if options.t is None else options.t
    t = min(t, num_experts) if options.materialises else 0
    m = t if options.m is None else options.m
    owner = np.tile(np.arange(num_experts) * num_ranks // num_experts, (num_layers, 1))

    def rearrange(load: Array) -> Array:
        owner[:] = shard(load, t, setup.topology, owner)
        return owner[..., None] == np.arange(num_ranks)

    start = owner[..., None] == np.arange(num_ranks)
    owners, moves = _rearranged(setup, loads, options.reshard_every, start, rearrange)
    loads, expected = loads[WARM:], expected[WARM:]
    home = owners.argmax(-1)
    hosts = np.empty_like(owners)
    for at in np.ndindex(hosts.shape[:2]):
        hosts[at] = materialise(home[at], expected[at], t, m, setup.topology)
    gather_s = sparse_s(setup, owners, hosts)
    late_s = np.zeros_like(gather_s)
    rows = arrivals(loads, hosts, setup.num_nodes)
    if options.calibrates:
        more = _calibrated(setup, loads, home, hosts, t, m)
        extra_s = sparse_s(setup, owners, (more & ~hosts) | owners)
        rows_2 = arrivals(loads, more, setup.num_nodes)
        pays = _layer_s(setup, rows_2) + 2 * extra_s < _layer_s(setup, rows)
        late_s = np.where(pays, extra_s, 0.0)
        hosts = np.where(pays[..., None, None], more, hosts)
        rows = np.where(pays[..., None, None], rows_2, rows)
    backward_s = sparse_s(setup, owners, hosts)
    if options.remat:
        backward_s = 2 * backward_s
    return result(
        setup,
        rows,
        _with_copies(setup, hosts, owners, remat=options.remat),
        gather=np.maximum(0, gather_s - setup.attention_s) + late_s,
        reduce=np.maximum(0, backward_s - 2 * setup.attention_s),
        move=moves,
        collectives=gather_s + late_s + backward_s,
    )


System = Callable[[Setup, Array, Options], Result]
SYSTEMS: dict[str, tuple[System, Options]] = {
    "ep": (ep, Options()),
    "fastermoe": (faster, Options()),
    "smartmoe": (smart, Options()),
    "flexmoe": (flex, Options()),
    "fsdp": (fsdp, Options()),
    "eplb": (eplb_like, Options()),
    "hecate": (hecate, Options()),
    "hecate-rm": (hecate, Options(remat=True)),
}
RIVALS = ("fastermoe", "smartmoe", "flexmoe")  # that the paper compares with, beside EP


# ----------------------------------------------------------------------------------------------------------- shared


def contiguous(setup: Setup) -> Array:
    """bool [E, W]."""
    return Placement.contiguous(setup.model.num_experts, setup.cluster.num_ranks).hosts


def boundaries(num_steps: int, every: int) -> list[int]:
    """Steps before which placements change; none where ``every`` is 0."""
    if every == 0:
        return []
    return sorted({FIRST, *(step for step in range(1, num_steps) if (step - WARM) % every == 0 and step > FIRST)})


def _rearranged(
    setup: Setup, loads: Array, every: int, start: Array, rearrange: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """hosts bool [counted steps, layers, E, W] and seconds of moves [counted steps, layers], of a placement that
    ``rearrange`` makes of the last steps' loads [layers, E]."""
    expected = predicted(loads, WINDOW)
    found, moves = np.empty((len(loads), *start.shape), dtype=bool), np.zeros(loads.shape[:2])
    now, changes = start, set(boundaries(len(loads), every))
    for step in range(len(loads)):
        if step in changes:
            after = rearrange(expected[step])
            moves[step] = move_s(setup, now, after)
            now = after
        found[step] = now
    return found[WARM:], moves[WARM:]


def _copied(setup: Setup, loads: Array, options: Options, rearrange: Callable[[Array], Array]) -> Result:
    """Of whole copies, whose gradients are all-reduced under the attention's backward as far as it goes."""
    start = np.stack([contiguous(setup)] * loads.shape[1])
    hosts, moves = _rearranged(setup, loads, options.every, start, rearrange)
    reduce_s = all_reduce_s(setup, hosts)
    rows = arrivals(loads[WARM:], hosts, setup.num_nodes)
    copies = Copies(_slots(setup, options) * setup.model.num_layers)
    reduce = np.maximum(0, reduce_s - 2 * setup.attention_s)
    return result(setup, rows, copies, reduce=reduce, move=moves, collectives=reduce_s)


def _calibrated(setup: Setup, loads: Array, home: Array, hosts: Array, t: int, m: int) -> Array:
    """P' with what Algorithm 1 adds by the true loads and the memory that is left."""
    found = hosts.copy()
    total = loads.sum(-2)
    own = home[..., None] == np.arange(hosts.shape[-1])
    left = m - (hosts & ~own).sum(-2).max(-1)
    for at in np.ndindex(hosts.shape[:2]):
        if left[at] > 0:
            found[at] |= materialise(home[at], total[at], t, int(left[at]), setup.topology)
    return found


def _layer_s(setup: Setup, rows: Array) -> Array:
    return 4 * exchange_s(setup, rows) + 3 * experts_s(setup, rows)


def _slots(setup: Setup, options: Options) -> int:
    return options.slots * setup.model.num_experts // setup.cluster.num_ranks


def _owned(setup: Setup) -> Copies:
    """What every rank owns, all layers together."""
    return Copies(setup.model.num_layers * setup.model.num_experts / setup.cluster.num_ranks)


def _with_copies(setup: Setup, hosts: Array, owners: Array, *, remat: bool = False) -> Copies:
    """``hosts`` bool [steps, layers, E, W]; resident in all layers, or (``remat``) in one."""
    added = (hosts & ~owners).sum(-2)  # [steps, layers, W]
    widest = float(added.max())
    most = widest if remat else float(added.sum(1).max()) * setup.model.num_layers / hosts.shape[1]
    return Copies(_owned(setup).owned, most, widest)
