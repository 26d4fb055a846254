"""Lines of JSON that hold whole numbers alone, read by a compiled loop, several times as fast as by a general parser.

Whatever else a piece holds, a fraction in a list, a null, weights, another depth from line to line, makes ``read`` give
up: then the general parser reads it, and says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.compiled import compiled

SCALARS, LISTS = ("step", "layer", "rank"), ("ids", "counts")
MOST_DEPTH = 4
NAME_BYTES = 24


def read(
    piece: bytes, called: Mapping[str, Sequence[str]], never: Sequence[str]
) -> tuple[dict[str, np.ndarray], str, np.ndarray, list[np.ndarray]] | None:
    """Of each line ``SCALARS``, as far as they are given; the name of its list; all its numbers, int64; and how long
    the lists are, outermost first. ``called``: names of each; ``never``: names of what is read elsewhere."""
    names, fields = [], []
    for number, field in enumerate((*SCALARS, *LISTS)):
        names += [each.encode() for each in called[field]]
        fields += [number] * len(called[field])
    names += [each.encode() for each in never]
    fields += [-1] * len(never)
    known = np.zeros((len(names), NAME_BYTES), np.uint8)
    for row, letters in zip(known, names, strict=True):
        row[: len(letters)] = np.frombuffer(letters, np.uint8)
    buffer = np.frombuffer(piece, np.uint8)
    num_lines = piece.count(b"\n") + 1
    scalars = np.full((len(SCALARS), num_lines), -1, np.int64)
    values = np.empty(len(piece) // 2 + 1, np.int64)  # as many as there may be: memory is taken when it is written to
    lengths, sizes = np.empty((MOST_DEPTH, len(piece) // 2 + 1), np.int64), np.zeros(MOST_DEPTH, np.int64)
    found = _read(buffer, known, np.array(list(map(len, names))), np.array(fields), scalars, values, lengths, sizes)
    num, num_values, depth, which = found
    if num <= 0 or which < 0:
        return None
    given: dict[str, np.ndarray] = {}
    for name, column in zip(SCALARS, scalars[:, :num], strict=True):
        if (column >= 0).all():
            given[name] = column
        elif (column >= 0).any():
            return None
    return given, LISTS[which], values[:num_values], [lengths[at, : sizes[at]] for at in range(depth)]


@compiled(nogil=True)
def _read(buffer, names, name_sizes, fields, scalars, values, lengths, sizes):  # type: ignore[no-untyped-def]
    """Number of lines (-1: given up), number of values, depth of the lists, which of ``LISTS``."""
    quote, backslash, comma, colon = 34, 92, 44, 58
    at, end, num, num_values, depth, which = 0, len(buffer), 0, 0, -1, -1
    count = np.zeros(lengths.shape[0] + 1, np.int64)
    while at < end:
        if buffer[at] <= 32:
            at += 1
            continue
        if buffer[at] != 123:  # {
            return -1, 0, 0, -1
        at += 1
        lists, ready = 0, True  # for a name; behind a value a comma comes first
        while True:  # a name and its value
            while at < end and (buffer[at] <= 32 or (buffer[at] == comma and not ready)):
                ready = ready or buffer[at] == comma
                at += 1
            if at >= end:
                return -1, 0, 0, -1
            if buffer[at] == 125:  # }
                at += 1
                break
            if buffer[at] != quote or not ready:
                return -1, 0, 0, -1
            ready, begin = False, at + 1
            at = begin
            while at < end and buffer[at] != quote:
                if buffer[at] == backslash or buffer[at] == 10:
                    return -1, 0, 0, -1
                at += 1
            field = -2
            for each in range(len(names)):
                if name_sizes[each] == at - begin:
                    same = True
                    for j in range(name_sizes[each]):
                        if names[each, j] != buffer[begin + j]:
                            same = False
                            break
                    if same:
                        field = fields[each]
            at += 1
            while at < end and (buffer[at] <= 32 or buffer[at] == colon):
                at += 1
            if at >= end or field == -1:
                return -1, 0, 0, -1
            if field == -2:  # of no use here
                at = _skip(buffer, at)
                if at < 0:
                    return -1, 0, 0, -1
            elif field < scalars.shape[0]:
                begin, value = at, 0
                while at < end and 48 <= buffer[at] <= 57:
                    value = 10 * value + buffer[at] - 48
                    at += 1
                ended = at < end and (buffer[at] == comma or buffer[at] == 125 or buffer[at] <= 32)
                if at == begin or at - begin > 15 or not ended or scalars[field, num] >= 0:
                    return -1, 0, 0, -1
                scalars[field, num] = value
            else:
                if which not in (-1, field - scalars.shape[0]) or lists or buffer[at] != 91:
                    return -1, 0, 0, -1
                which, lists, level, open_ = field - scalars.shape[0], 1, 0, True  # for a value
                while True:  # nested lists
                    letter = buffer[at] if at < end else 10
                    if letter == 91 and open_:
                        level += 1
                        if level > lengths.shape[0] or level - 1 == depth:
                            return -1, 0, 0, -1
                        count[level] = 0
                        at += 1
                    elif letter == 93 and (not open_ or count[level] == 0):
                        lengths[level - 1, sizes[level - 1]] = count[level]
                        sizes[level - 1] += 1
                        level -= 1
                        count[level] += 1
                        open_ = False
                        at += 1
                        if level == 0:
                            break
                    elif letter == 32:
                        at += 1
                    elif letter == comma and not open_:
                        open_ = True
                        at += 1
                    elif 48 <= letter <= 57 and open_:
                        open_ = False
                        if depth < 0:
                            depth = level
                        begin, value = at, 0
                        while at < end and 48 <= buffer[at] <= 57:
                            value = 10 * value + buffer[at] - 48
                            at += 1
                        if level != depth or at - begin > 15:
                            return -1, 0, 0, -1
                        after = buffer[at] if at < end else 10
                        if after != comma and after != 93 and after != 32:
                            return -1, 0, 0, -1
                        values[num_values] = value
                        num_values += 1
                        count[level] += 1
                    else:
                        return -1, 0, 0, -1
        if not lists:
            return -1, 0, 0, -1
        num += 1
    return num, num_values, depth, which


@compiled()
def _skip(buffer, at):  # type: ignore[no-untyped-def]
    """Behind the value that begins at ``at``; -1 if it has no end on its line."""
    level, inside = 0, False
    while at < len(buffer):
        letter = buffer[at]
        if letter == 10:
            return -1
        if inside:
            if letter == 92:
                at += 1
            elif letter == 34:
                inside = False
        elif letter == 34:
            inside = True
        elif letter == 91 or letter == 123:
            level += 1
        elif letter == 93 or letter == 125:
            if level == 0:
                return at
            level -= 1
        elif letter == 44 and level == 0:
            return at
        at += 1
    return -1
