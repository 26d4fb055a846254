"""How ``make test`` spreads the tests over processes (pytest-xdist): those that measure time run first and alone.

A test marked ``timed`` has the machine for itself: one process runs them one after the other, and the others wait until
the last has ended. Then files are dealt out whole. Files that need the same expensive fixture stay in one process, so
that it is made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadGroupScheduling

TIMED = "timed"
#: files that use a fixture stay together; the first of these that a file uses decides, and they are dealt out first
GROUP_OF_FIXTURE = {"session": "ranks", "one_machine": "slurm"}


def group(items: list[pytest.Item]) -> None:
    """Give every test that does not merely stay with its file the group that xdist keeps in one process."""
    of_file = {}
    for fixture, name in reversed(GROUP_OF_FIXTURE.items()):
        of_file |= {item.path: name for item in items if fixture in getattr(item, "fixturenames", ())}
    for item in items:
        name = TIMED if item.get_closest_marker(TIMED) else of_file.get(item.path)
        if name:
            item.add_marker(pytest.mark.xdist_group(name))


class TimedFirst(LoadGroupScheduling):
    """Units of work are the groups, and the files of all other tests."""

    def _split_scope(self, nodeid: str) -> str:
        test, _, name = nodeid.rpartition("@")
        return name if test and "]" not in name else nodeid.partition("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        if self.workqueue and not self._others_time(node):
            self.workqueue.move_to_end(min(self.workqueue, key=_turn), last=False)
            super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        if node.shutting_down:
            return
        if not self.workqueue:
            node.shutdown()
        elif self._pending_of(self.assigned_work[node]) < 2:  # it needs the next test to begin its last one
            self._assign_work_unit(node)

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        super().mark_test_complete(node, item_index, duration)
        for other in self._idle():
            self._reschedule(other)

    def _others_time(self, node: Any) -> bool:
        """Whether timed tests are still to run on another node."""
        others = (units for other, units in self.assigned_work.items() if other is not node)
        return any(not all(units[TIMED].values()) for units in others if TIMED in units)

    def _idle(self) -> Iterator[Any]:
        yield from [node for node in self.nodes if not self._pending_of(self.assigned_work[node])]


def _turn(unit: str) -> int:
    first = [TIMED, *GROUP_OF_FIXTURE.values()]
    return first.index(unit) if unit in first else len(first)
