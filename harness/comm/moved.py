"""Bytes of experts' parameters that this rank has sent to others, by what they were sent for."""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping

#: an expert changes places, with its optimizer state or without; copies for one batch, ahead of its gate and behind it
MOVES, COPIES, LATE_COPIES = "moves", "copies", "late copies"
KINDS = (MOVES, COPIES, LATE_COPIES)


class Moved:
    """So far. Any lane may add."""

    def __init__(self) -> None:
        self._bytes: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def add(self, kind: str, num_bytes: int) -> None:
        with self._lock:
            self._bytes[kind] += num_bytes

    def since(self, before: Mapping[str, int]) -> dict[str, int]:
        """Beside what there was ``before`` (``since({})`` of that moment); kinds of which nothing was sent are left
        out."""
        with self._lock:
            return dict(self._bytes - collections.Counter(before))


__all__ = ["COPIES", "KINDS", "LATE_COPIES", "MOVES", "Moved"]
