"""Running ranks that serve many tests."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from harness import presets
from harness.launch.session import Session, open_session
from harness.specs import Cluster

#: what a first training step and a first conformance check import: once, and not on every rank
PRELOAD = (
    "harness.bench.race",
    "harness.bench.conformance",
    "harness.bench.checkpoint",
    "torch._dynamo",
    "harness.compiled",
)
MAX_RANKS = 32  # that are kept at a time, of some 100 MB each


def start(
    cluster: Cluster, log_dir: Path, preload: tuple[str, ...] = PRELOAD
) -> contextlib.AbstractContextManager[Session]:
    """Ranks for one test alone."""
    return open_session(cluster, log_dir=log_dir, preload=preload)


class Sessions:
    """``get(cluster or preset name)``: its open session, started anew if a rank had failed. ``preload``: nothing, for
    ranks that only send and receive.

    Ranks of a local cluster know its shape alone, so clusters of one shape share them. Of too many ranks, those that
    nobody has asked for the longest end.
    """

    def __init__(self, folders: pytest.TempPathFactory):
        self.folders = folders
        self.open: dict[str, tuple[Session, contextlib.ExitStack]] = {}  # the last asked for comes last

    def get(self, cluster: Cluster | str, preload: tuple[str, ...] = PRELOAD) -> Session:
        cluster = presets.cluster(cluster) if isinstance(cluster, str) else cluster
        key = f"local {cluster.shape}" if cluster.kind == "local" else cluster.digest
        session, stack = self.open.pop(key, (None, contextlib.ExitStack()))
        if session is None or session.closed:
            self._make_room(cluster.num_ranks)
            session = stack.enter_context(start(cluster, self.folders.mktemp(f"session-{cluster.name}"), preload))
        self.open[key] = session, stack
        return session

    def _make_room(self, num_ranks: int) -> None:
        while self.open and num_ranks + sum(each.cluster.num_ranks for each, _ in self.open.values()) > MAX_RANKS:
            self.open.pop(next(iter(self.open)))[1].close()

    def close(self) -> None:
        for _, stack in self.open.values():
            stack.close()
