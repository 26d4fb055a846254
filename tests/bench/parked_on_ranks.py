"""A race whose contenders wait elsewhere between their turns, and the same race with room for all of them."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

from harness.bench.race import run_race
from harness.bench.room import Room
from harness.comm.job import Job


def both(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Samples and how of every cell of the race twice, and of the first the bytes that others held in any turn."""
    held: list[int] = []
    turn = Room.turn

    @contextlib.contextmanager
    def watched(self: Room, contender: Any, warm_up: bool = False) -> Any:
        with turn(self, contender, warm_up):
            others = [each for each in self.contenders if each is not contender]
            held.append(sum(tensor.untyped_storage().nbytes() for each in others for tensor in each.keep()))
            yield

    with mock.patch.object(Room, "_crowded", return_value=True), mock.patch.object(Room, "turn", watched):
        parked = run_race(job, payload)["cells"]
    stays = run_race(job, payload | {"repeats": 2 * payload["repeats"]})["cells"]
    return {"parked": parked, "stays": stays, "held": held}
