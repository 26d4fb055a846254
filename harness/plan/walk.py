"""The loops of the event model, compiled. X: all ranks of all configurations, ranks last."""

from __future__ import annotations

import numpy as np

from harness.compiled import compiled


@compiled()
def walk(order, waits, bounds, groups, durations, start, end):  # type: ignore[no-untyped-def]
    """Fill ``start`` and ``end`` [num_tasks, X], which are 0, of the tasks ``order``. Task i waits for
    ``waits[bounds[i] : bounds[i + 1]]`` and takes ``durations[i]`` [X]. ``groups`` [num_tasks, 2]: of a collective how
    many ranks meet, and how far they are apart; (1, 1) of any other task."""
    for here in order:
        for each in waits[bounds[here] : bounds[here + 1]]:
            for x in range(start.shape[1]):
                start[here, x] = max(start[here, x], end[each, x])
        members, apart = groups[here]
        if members == 1:
            for x in range(start.shape[1]):
                end[here, x] = start[here, x] + durations[here, x]
            continue
        for block in range(0, start.shape[1], members * apart):
            for first in range(block, block + apart):
                begins, lasts = 0.0, -np.inf
                for x in range(first, first + members * apart, apart):
                    begins, lasts = max(begins, start[here, x]), max(lasts, durations[here, x])
                for x in range(first, first + members * apart, apart):
                    start[here, x], end[here, x] = begins, begins + lasts


@compiled()
def overlap(start, end, other_start, other_end, found):  # type: ignore[no-untyped-def]
    """``found`` [n, X]: how long each task of a lane, [n, X], overlaps the tasks of another, [m, X]. Tasks of a lane
    follow one another."""
    first = np.zeros(start.shape[1], dtype=np.int64)  # of the other lane that is not yet over
    for i in range(len(start)):
        for x in range(start.shape[1]):
            while first[x] < len(other_start) and other_end[first[x], x] <= start[i, x]:
                first[x] += 1
            both, j = 0.0, first[x]
            while j < len(other_start) and other_start[j, x] < end[i, x]:
                both += max(0.0, min(end[i, x], other_end[j, x]) - max(start[i, x], other_start[j, x]))
                j += 1
            found[i, x] = both
