"""Loops of the planners that replicate experts (``baselines.flexmoe``, ``baselines.eplb``), compiled.

``slots`` int64 [W, S]: the expert in each slot of each rank, -1 where it is free. ``load`` float64 [E]; an expert's
load is shared out evenly over the ranks that hold it.
"""

from __future__ import annotations

import numpy as np

from harness.compiled import compiled

EXPAND, SHRINK, MIGRATE = 0, 1, 2


@compiled()
def pack(order, weight, capacity, held, carried, own):  # type: ignore[no-untyped-def]
    """Items ``order`` (heaviest first) of ``weight`` [items] each to the pack with the least carried so far that has
    room (``capacity`` [packs]) and, if there is one, does not have an item of the same ``own`` [items] yet
    (``held`` bool [kinds, packs]). Fills ``carried`` [packs] and ``held``; returns the pack of every item."""
    to = np.empty(len(weight), dtype=np.int64)
    for item in order:
        best, best_double = -1, -1
        for p in range(len(capacity)):
            if capacity[p] == 0:
                continue
            if held[own[item], p]:
                if best_double < 0 or carried[p] < carried[best_double]:
                    best_double = p
            elif best < 0 or carried[p] < carried[best]:
                best = p
        if best < 0:
            best = best_double
        to[item] = best
        carried[best] += weight[item]
        capacity[best] -= 1
        held[own[item], best] = True
    return to


@compiled()
def _reduce(n):  # type: ignore[no-untyped-def]
    """Of an expert's gradient, what passes a port in an all-reduce over n ranks."""
    return 2.0 * (n - 1) / n


@compiled()
def state(load, slots, hosts, copies, carried, reduced):  # type: ignore[no-untyped-def]
    """Fill ``hosts`` bool [E, W], ``copies`` [E], ``carried`` and ``reduced`` [W] from ``slots``."""
    num_ranks, num_slots = slots.shape
    for d in range(num_ranks):
        for s in range(num_slots):
            if slots[d, s] >= 0 and not hosts[slots[d, s], d]:
                hosts[slots[d, s], d] = True
                copies[slots[d, s]] += 1
    for d in range(num_ranks):
        for e in range(len(load)):
            if hosts[e, d]:
                carried[d] += load[e] / copies[e]
                reduced[d] += _reduce(copies[e])


@compiled()
def _with_copies(load, hosts, copies, e, n, carried, reduced):  # type: ignore[no-untyped-def]
    """On the ranks that hold e, as if there were n copies of it."""
    more = load[e] / n - load[e] / copies[e]
    longer = _reduce(n) - _reduce(copies[e])
    for d in range(len(carried)):
        if hosts[e, d]:
            carried[d] += more
            reduced[d] += longer


@compiled()
def _time_s(carried, reduced, token_s, reduce_s):  # type: ignore[no-untyped-def]
    return carried.max() * token_s + reduced.max() * reduce_s


@compiled()
def _expand_into(load, slots, hosts, copies, carried, e):  # type: ignore[no-untyped-def]
    """Rank and slot for one more copy of e: where the busiest of the ranks that change then carries least. On a rank
    without a free slot, one that holds an expert with other copies; (-1, -1) if there is none."""
    num_ranks, num_slots = slots.shape
    busiest = np.zeros(len(load))  # rank that holds each expert
    for d in range(num_ranks):
        for s in range(num_slots):
            if slots[d, s] >= 0:
                busiest[slots[d, s]] = max(busiest[slots[d, s]], carried[d])
    best_d, best_s, least = -1, -1, np.inf
    come = load[e] / (copies[e] + 1)
    for d in range(num_ranks):
        if hosts[e, d]:
            continue
        free = -1
        for s in range(num_slots):
            if slots[d, s] < 0:
                free = s
        for s in range(num_slots):
            x = slots[d, s]
            if free >= 0:
                if s != free:
                    continue
                most = carried[d] + come
            elif copies[x] > 1:
                share, wider = load[x] / copies[x], load[x] / (copies[x] - 1)
                most = max(carried[d] + come - share, busiest[x] + wider - share)
            else:
                continue
            if most < least:
                best_d, best_s, least = d, s, most
    return best_d, best_s


@compiled()
def _displace(load, slots, hosts, copies, carried, e, d):  # type: ignore[no-untyped-def]
    """Rank and slot for one more copy of e whose expert moves to d, a holder of e with a free slot (returned last):
    the exchange that leaves the busier of both ranks least; -1 if there is none."""
    free = -1
    for s in range(slots.shape[1]):
        if slots[d, s] < 0:
            free = s
    best_d, best_s, least = -1, -1, carried[d] * (1 - 1e-12)
    if free < 0:
        return best_d, best_s, free
    come, left = load[e] / (copies[e] + 1), carried[d] - load[e] / copies[e] + load[e] / (copies[e] + 1)
    for to in range(slots.shape[0]):
        if hosts[e, to]:
            continue
        for s in range(slots.shape[1]):
            x = slots[to, s]
            if x < 0 or hosts[x, d]:
                continue
            share = load[x] / copies[x]
            most = max(carried[to] + come - share, left + share)
            if most < least:
                best_d, best_s, least = to, s, most
    return best_d, best_s, free


@compiled()
def _migrate_with(load, slots, hosts, copies, carried, d):  # type: ignore[no-untyped-def]
    """Slot of d, rank and slot elsewhere whose exchange leaves the busier of both ranks least; -1 if none lowers d."""
    found_s, found_d, found_t, least = -1, -1, -1, carried[d] * (1 - 1e-12)
    for s in range(slots.shape[1]):
        e = slots[d, s]
        if e < 0:
            continue
        mine = load[e] / copies[e]
        for other in range(slots.shape[0]):
            if other == d or hosts[e, other] or carried[other] >= carried[d]:
                continue
            for t in range(slots.shape[1]):
                x = slots[other, t]
                if x >= 0 and hosts[x, d]:
                    continue
                theirs = 0.0 if x < 0 else load[x] / copies[x]
                most = max(carried[d] - mine + theirs, carried[other] + mine - theirs)
                if most < least:
                    found_s, found_d, found_t, least = s, other, t, most
    return found_s, found_d, found_t


@compiled()
def _give(load, copies, carried, reduced, e, source, target):  # type: ignore[no-untyped-def]
    """A copy of e goes from one rank to another."""
    if e >= 0:
        carried[source] -= load[e] / copies[e]
        reduced[source] -= _reduce(copies[e])
        carried[target] += load[e] / copies[e]
        reduced[target] += _reduce(copies[e])


@compiled()
def _gain(load, hosts, copies, carried, reduced, e, to):  # type: ignore[no-untyped-def]
    """One more copy of e, on ``to``."""
    n = copies[e] + 1
    _with_copies(load, hosts, copies, e, n, carried, reduced)
    carried[to] += load[e] / n
    reduced[to] += _reduce(n)


@compiled()
def _lose(load, hosts, copies, carried, reduced, x, at):  # type: ignore[no-untyped-def]
    """One copy of x less, on ``at``."""
    carried[at] -= load[x] / copies[x]
    reduced[at] -= _reduce(copies[x])
    hosts[x, at] = False
    _with_copies(load, hosts, copies, x, copies[x] - 1, carried, reduced)
    hosts[x, at] = True


@compiled()
def adjust(load, slots, token_s, reduce_s, move_s, threshold, most):  # type: ignore[no-untyped-def]
    """FlexMoE's policy maker on ``slots``, in place. Returns the operations (kind, expert, rank) [n, 3], one row each,
    and the estimated seconds before and after. ``move_s``: of one expert, over the steps that it serves.

    Operations follow each other as long as the busiest rank's load does not rise; kept are those up to the point where
    time and moves together are least (several ranks may be equally busy, and one operation then gains nothing)."""
    num_ranks, num_slots = slots.shape
    hosts = np.zeros((len(load), num_ranks), dtype=np.bool_)
    copies = np.zeros(len(load), dtype=np.int64)
    carried, reduced = np.zeros(num_ranks), np.zeros(num_ranks)
    state(load, slots, hosts, copies, carried, reduced)
    done = np.empty((2 * most, 3), dtype=np.int64)
    num_done, num_kept, moved_s = 0, 0, 0.0
    now_s = _time_s(carried, reduced, token_s, reduce_s)
    before_s, kept_s, mean = now_s, now_s, load.sum() / num_ranks
    least_s, kept = now_s, slots.copy()
    for _ in range(most):
        d = carried.argmax()
        if carried[d] <= threshold * mean:
            break
        hot = -1
        for s in range(num_slots):
            e = slots[d, s]
            if e >= 0 and (hot < 0 or load[e] / copies[e] > load[hot] / copies[hot]):
                hot = e
        best_s, best, num_moves = np.inf, -1, 0
        carried_best, reduced_best = carried, reduced
        # Expand the hottest expert of the busiest rank; if its new slot is taken, who held it shrinks.
        to, slot = _expand_into(load, slots, hosts, copies, carried, hot)
        if to >= 0:
            c, r = carried.copy(), reduced.copy()
            if slots[to, slot] >= 0:
                _lose(load, hosts, copies, c, r, slots[to, slot], to)
            _gain(load, hosts, copies, c, r, hot, to)
            then_s = _time_s(c, r, token_s, reduce_s)
            if then_s + move_s < best_s:
                best_s, best, num_moves, carried_best, reduced_best = then_s + move_s, 0, 1, c, r
        # Or expand it and let who is there migrate to where it was.
        to_2, slot_2, free_2 = _displace(load, slots, hosts, copies, carried, hot, d)
        if to_2 >= 0:
            c, r = carried.copy(), reduced.copy()
            _give(load, copies, c, r, slots[to_2, slot_2], to_2, d)
            _gain(load, hosts, copies, c, r, hot, to_2)
            then_s = _time_s(c, r, token_s, reduce_s)
            if then_s + 2 * move_s < best_s:
                best_s, best, num_moves, carried_best, reduced_best = then_s + 2 * move_s, 1, 2, c, r
        # Or let one of the rank's experts change places with one elsewhere.
        mine, other, theirs = _migrate_with(load, slots, hosts, copies, carried, d)
        if mine >= 0:
            c, r = carried.copy(), reduced.copy()
            _give(load, copies, c, r, slots[d, mine], d, other)
            _give(load, copies, c, r, slots[other, theirs], other, d)
            both = 1 if slots[other, theirs] < 0 else 2
            then_s = _time_s(c, r, token_s, reduce_s)
            if then_s + both * move_s < best_s:
                best_s, best, num_moves, carried_best, reduced_best = then_s + both * move_s, 2, both, c, r
        if best < 0 or carried_best.max() > carried[d]:
            break
        if best == 2:
            for e, source, target in ((slots[d, mine], d, other), (slots[other, theirs], other, d)):
                if e >= 0:
                    hosts[e, source] = False
                    hosts[e, target] = True
                    done[num_done] = (MIGRATE, e, target)
                    num_done += 1
            slots[d, mine], slots[other, theirs] = slots[other, theirs], slots[d, mine]
        else:
            if best == 1:
                to, slot = to_2, slot_2
                x = slots[to, slot]
                slots[d, free_2] = x
                hosts[x, to] = False
                hosts[x, d] = True
                done[num_done] = (MIGRATE, x, d)
                num_done += 1
            elif slots[to, slot] >= 0:
                x = slots[to, slot]
                hosts[x, to] = False
                copies[x] -= 1
                done[num_done] = (SHRINK, x, to)
                num_done += 1
            slots[to, slot] = hot
            hosts[hot, to] = True
            copies[hot] += 1
            done[num_done] = (EXPAND, hot, to)
            num_done += 1
        carried, reduced = carried_best, reduced_best
        now_s = _time_s(carried, reduced, token_s, reduce_s)
        moved_s += num_moves * move_s
        if now_s + moved_s < least_s:
            least_s, kept_s, num_kept, kept = now_s + moved_s, now_s, num_done, slots.copy()
    slots[:] = kept
    return done[:num_kept].copy(), before_s, kept_s
