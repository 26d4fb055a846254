"""How ``make test`` spreads the tests over processes (pytest-xdist): those that measure time run first and alone.

A test marked ``timed`` has the machine for itself: one process runs them one after the other, and the others wait until
the last has ended. Then files are dealt out whole: those on a real Slurm, which wait more than they compute, to one
process; those that need running ranks to the one that has them, and to another only when nothing else is left.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TIMED, RANKS, WAITS, LONG, OTHER = "timed", "ranks", "waits", "long", "other"
#: of this folder: what lasts some seconds comes before what lasts none, so that all processes end at the same time
LASTS = ("cuda", "gpu", "sweep", "launch", "bench/test_run.py", "report", "test_placing.py", "test_cli.py", "methods")
#: of those that need ranks, what lasts longest with few tests; files with many tests come first anyway
FEW_AND_LONG = ("bench/test_phases.py", "bench/test_witness.py", "bench/test_conserved.py")
UNITS_FILE = "units_file"  # where a process tells the one that deals out tests which unit each belongs to


def units_of(items: Iterable[pytest.Item]) -> dict[str, str]:
    """Unit of every test: ``timed``, ``waits`` (there is one Slurm at a time), or the kind and the path of its file."""
    items, used = list(items), {}
    for item in items:
        used.setdefault(item.path, set()).update(getattr(item, "fixturenames", ()))
    units = {path: _unit(path, fixtures) for path, fixtures in used.items()}
    return {item.nodeid: TIMED if item.get_closest_marker(TIMED) else units[item.path] for item in items}


def _unit(path: Path, fixtures: set[str]) -> str:
    if "one_machine" in fixtures:
        return WAITS
    long = str(path).startswith(tuple(str(Path(__file__).parent / name) for name in LASTS))
    return f"{RANKS if 'session' in fixtures else LONG if long else OTHER} {path}"


class TimedFirst(LoadScopeScheduling):
    """Its scopes are the units. A worker holds back its last test until it knows the next, so it is told early."""

    def schedule(self) -> None:
        if self.collection is None:
            (*_, node) = self.nodes
            self.units = json.loads(Path(node.workerinput[UNITS_FILE]).read_text())
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return str(self.units[nodeid])

    def _assign_work_unit(self, node: Any) -> None:
        if self.workqueue and not self._others_time(node):
            order = [RANKS, WAITS, LONG, OTHER] if self._has_ranks(node) else [WAITS, LONG, OTHER, RANKS]
            unit = min(
                self.workqueue,
                key=lambda each: ([TIMED, *order].index(each.partition(" ")[0]), not each.endswith(FEW_AND_LONG)),
            )
            self.workqueue.move_to_end(unit, last=False)
            super()._assign_work_unit(node)

    def _has_ranks(self, node: Any) -> bool:
        """Whether it ran the timed tests or ranks already; the first one does when nobody did."""
        has = [
            each
            for each, units in self.assigned_work.items()
            if any(unit.partition(" ")[0] in (TIMED, RANKS) for unit in units)
        ]
        return node in has if has else node is self.nodes[0]

    def _reschedule(self, node: Any) -> None:
        if node.shutting_down:
            return
        if not self.workqueue:
            node.shutdown()
        elif self._pending_of(self.assigned_work[node]) < 2:
            self._assign_work_unit(node)

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        super().mark_test_complete(node, item_index, duration)
        for other in self.nodes:
            if not self._pending_of(self.assigned_work[other]):
                self._reschedule(other)

    def _others_time(self, node: Any) -> bool:
        """Whether timed tests are still to run on another node."""
        others = (units for other, units in self.assigned_work.items() if other is not node)
        return any(not all(units[TIMED].values()) for units in others if TIMED in units)


# ------------------------------------------------------------------------------------------------------ pytest's hooks


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    folder = tempfile.TemporaryDirectory(prefix="moebench-tests-")
    node.config.add_cleanup(folder.cleanup)
    node.workerinput[UNITS_FILE] = str(Path(folder.name) / "units.json")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TimedFirst | None:
    return TimedFirst(config, log) if config.getvalue("dist") == "load" else None


@pytest.hookimpl(tryfirst=True)  # before xdist says that it is done
def pytest_collection_finish(session: pytest.Session) -> None:
    if told := getattr(session.config, "workerinput", {}).get(UNITS_FILE):
        Path(told).write_text(json.dumps(units_of(session.items)))
