"""Ports that ranks share, compiled: when each of the ranks at one port has sent, or got, what it has to.

A port is shared out evenly among the ranks at work, and each begins when it is ready. ``together`` and ``last`` say the
same as ``fair`` with less work, where all begin at once and where only the last end matters; placements are searched by
them. (Numba knows no more of a loop that calls these than its own file: touch that file too when these change.)
"""

from __future__ import annotations

import numpy as np

from harness.compiled import compiled


@compiled()
def fair(begins, amounts, each_s, done):  # type: ignore[no-untyped-def]
    """``done`` [n] is filled with when each is done that has ``amounts`` [n] to send from ``begins`` [n] on, at
    ``each_s`` seconds for one alone. Virtual time: how much each one at work would have got since the start."""
    waiting, working = 0, 1
    state, target = np.zeros(len(begins), dtype=np.int64), np.zeros(len(begins))
    now, got, busy = 0.0, 0.0, 0
    for _ in range(2 * len(begins)):
        first, start, next_, least = -1, np.inf, -1, np.inf
        for i in range(len(begins)):
            if state[i] == waiting and begins[i] < start:
                first, start = i, begins[i]
            elif state[i] == working and target[i] < least:
                next_, least = i, target[i]
        end = now + (least - got) * busy * each_s if busy else np.inf
        if first >= 0 and start <= end:
            if busy and each_s > 0:
                got += (start - now) / (busy * each_s)
            now = start
            state[first], target[first] = working, got + amounts[first]
            busy += 1
        else:
            now, got = end, least
            state[next_], done[next_] = 2, now
            busy -= 1


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
    """``fair`` of ranks first .. first + num - 1 that begin at 0; ``done`` of each is raised to its end. ``order``:
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
    """When all of ranks first .. first + num - 1 are done: a port never rests while one that has begun is not."""
    sort(order, first, num, begins)
    at = 0.0
    for place in range(num):
        g = order[place]
        at = max(at, begins[g]) + amounts[g] * each_s
    return at
