"""What every rank does now, readable from outside even when the rank is dead or stuck.

One memory-mapped file with a slot per rank: a write is one slice assignment (about a microsecond), so that
``job.phase`` may stand in a timed loop.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

from harness.errors import bad
from harness.launch import scratch

SLOT_BYTES = 256
HEAD = struct.Struct("<Qd")  # number of changes, time.monotonic() of the last
TEXT_BYTES = SLOT_BYTES - HEAD.size


@dataclasses.dataclass(frozen=True)
class Phase:
    """Last phase of a rank, how many it has named, and for how long the last has stood."""

    text: str
    num_changes: int
    age_s: float


class PhaseBoard:
    """The file of all ranks' phases."""

    def __init__(self, path: Path, num_ranks: int, *, create: bool = False):
        if create:
            path.write_bytes(bytes(SLOT_BYTES * num_ranks))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SLOT_BYTES * num_ranks)

    def writer(self, rank: int) -> Callable[[str], None]:
        """The function that ``rank`` calls to name its phase."""
        begin, num_changes = rank * SLOT_BYTES, 0

        def write(text: str) -> None:
            nonlocal num_changes
            num_changes += 1
            slot = HEAD.pack(num_changes, time.monotonic()) + text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
            self._map[begin : begin + SLOT_BYTES] = slot

        return write

    def read(self, rank: int) -> Phase:
        """The last phase that ``rank`` named."""
        slot = self._map[rank * SLOT_BYTES : (rank + 1) * SLOT_BYTES]
        num_changes, since = HEAD.unpack_from(slot)
        text = slot[HEAD.size :].rstrip(b"\0").decode(errors="replace")
        return Phase(text or "not started", num_changes, time.monotonic() - since if num_changes else 0.0)


def private_board(num_ranks: int) -> tuple[scratch.Folder, PhaseBoard]:
    """A folder that only this user reads, with the ranks' phases in it."""
    folder = None
    try:
        folder = scratch.Folder()
        return folder, PhaseBoard(folder.path / "phases", num_ranks, create=True)
    except OSError as error:
        if folder:
            folder.close()
        value = os.environ.get("TMPDIR", "/tmp")
        raise bad("TMPDIR", value, f"{error.strerror}; free some space there, or name another folder") from None
