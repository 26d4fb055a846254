"""Bytes of training steps whose systems move or copy experts: each step's are what its course makes of the routing."""

from __future__ import annotations

from tests.plan.test_course import MOVING, experiment_of

NUM_STEPS = 5


def test_a_moving_system_sends_what_its_course_says(session) -> None:
    planted = {name: experiment_of(name, **MOVING["smartmoe"]) for name in ("forgets", "chatters")}
    wanted = {name: experiment_of(name, **options) for name, options in MOVING.items()} | planted
    payload = {"experiments": [each.model_dump(mode="json") for each in wanted.values()], "num_steps": NUM_STEPS}
    on = next(iter(wanted.values())).cluster
    found = session(on).call("tests.bench.moving_on_ranks:checked", payload, timeout_s=250)[0]
    for name, (reason, num_foreseen) in found.items():
        if name in planted:
            assert "bytes, planned are" in reason, name
        else:
            assert not reason, (name, reason)
        assert num_foreseen == NUM_STEPS, name
