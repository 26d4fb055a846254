"""Ports that several flows share, compiled: when each of them is done.

A port is shared out evenly among the flows at work, and each begins when it is ready. ``together`` and ``last`` say the
same as ``fair`` with less work, where all begin at once and where only the last end matters; placements are searched by
them. (Numba knows no more of a loop that calls these than its own file: touch that file too when these change.)
"""

from __future__ import annotations

import heapq

import numpy as np

from harness.compiled import compiled


@compiled()
def fair(begins, amounts, each_s, done):  # type: ignore[no-untyped-def]
    """``done`` [n] is filled with when each flow is done that has ``amounts`` [n] to send from ``begins`` [n] on, at
    ``each_s`` seconds for one alone. Virtual time: how much a flow at work would have got since the start."""
    order = np.argsort(begins)
    at_work = [(0.0, 0)]  # (virtual time when it is done, flow), a heap
    at_work.pop()
    now, got, next_ = 0.0, 0.0, 0
    while next_ < len(begins) or len(at_work) > 0:
        end = now + (at_work[0][0] - got) * len(at_work) * each_s if len(at_work) > 0 else np.inf
        if next_ < len(begins) and begins[order[next_]] <= end:
            flow = order[next_]
            next_ += 1
            if len(at_work) > 0 and each_s > 0:
                got += (begins[flow] - now) / (len(at_work) * each_s)
            now = begins[flow]
            heapq.heappush(at_work, (got + amounts[flow], flow))
        else:
            got, flow = heapq.heappop(at_work)
            now = end
            done[flow] = now


@compiled()
def sort(order, first, num, key):  # type: ignore[no-untyped-def]
    """``order[:num]``: first .. first + num - 1 by rising ``key``; insertion, as units are small."""
    for place in range(num):
        g, at = first + place, place
        while at > 0 and key[order[at - 1]] > key[g]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = g


@compiled()
def together(order, first, num, amounts, each_s, done):  # type: ignore[no-untyped-def]
    """``fair`` of first .. first + num - 1, which begin at 0; ``done`` of each is raised to its end. ``order``:
    room for ``num`` integers."""
    sort(order, first, num, amounts)
    at, before = 0.0, 0.0
    for place in range(num):
        g = order[place]
        at += (amounts[g] - before) * (num - place) * each_s
        before = amounts[g]
        done[g] = max(done[g], at)


@compiled()
def last(order, first, num, begins, amounts, each_s):  # type: ignore[no-untyped-def]
    """When all of first .. first + num - 1 are done: a port never rests while one that has begun is not."""
    sort(order, first, num, begins)
    at = 0.0
    for place in range(num):
        g = order[place]
        at = max(at, begins[g]) + amounts[g] * each_s
    return at


@compiled()
def pairwise(matrix, begins, units, ports, shared, each_s, free, done):  # type: ignore[no-untyped-def]
    """``done`` [W] of each rank is raised to when its flows, out and in, are done: of ``matrix`` [W, W], each from when
    both its ranks begin, ``begins`` [W], and its port is free. ``units`` [L, W]: in which unit of each line a
    rank is, and ``ports`` [L, W] by which port it goes, one after another; where ``shared`` [L], ranks of
    a unit reach each other by it, else others, out and in. ``free`` [L, 2, W]: when each port is, out and in; raised
    too."""
    num_ranks = len(begins)
    ready, amounts, ends = np.empty(num_ranks**2), np.empty(num_ranks**2), np.empty(num_ranks**2)
    source, target = np.empty(num_ranks**2, dtype=np.int64), np.empty(num_ranks**2, dtype=np.int64)
    for line in range(len(units)):
        for side in range(1 if shared[line] else 2):
            end = 0
            for port in range(ports[line, num_ranks - 1] + 1):
                first, count = end, 0
                while end < num_ranks and ports[line, end] == port:
                    end += 1
                for here in range(first, end):
                    for other in range(num_ranks):
                        i, j = (here, other) if side == 0 else (other, here)
                        inside = units[line, other] == units[line, here]
                        if matrix[i, j] > 0 and i != j and inside == shared[line]:
                            ready[count] = max(begins[i], begins[j], free[line, side, port])
                            amounts[count], source[count], target[count] = matrix[i, j], i, j
                            count += 1
                fair(ready[:count], amounts[:count], each_s[line], ends[:count])
                for flow in range(count):
                    done[source[flow]] = max(done[source[flow]], ends[flow])
                    done[target[flow]] = max(done[target[flow]], ends[flow])
                    free[line, side, port] = max(free[line, side, port], ends[flow])
