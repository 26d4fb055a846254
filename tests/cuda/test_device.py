"""The emulated device itself: what it says, what it refuses, and that every planted fault is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

CLEAN = {"races": [], "reuses": []}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``tests.cuda.planted`` found, in a process of its own."""
    out = tmp_path_factory.mktemp("planted") / "found.json"
    subprocess.run([sys.executable, "-m", "tests.cuda.planted", str(out)], check=True, timeout=120)
    return json.loads(out.read_text())


def test_a_race_names_tasks_lanes_and_what_was_used(planted):
    (race,) = planted["race"]["races"]
    assert race == "[use] reads, on compute (add), what [make] writes on inter, in no order"


def test_a_reuse_names_tasks_lanes_and_the_pool(planted):
    assert not planted["reuse"]["races"]
    (reuse,) = planted["reuse"]["reuses"]
    assert reuse.startswith("[make-more] uses, on inter, memory of inter that was allocated in [make]")
    assert reuse.endswith("that [use] may still use on compute")


def test_what_is_recorded_or_waited_for_is_no_fault(planted):
    for name in ("recorded", "looked_at", "host_waits", "columns"):
        assert planted[name] == CLEAN, name


def test_an_executor_without_wait_event_is_seen(planted):
    assert planted["missing_wait_event"]["races"] == planted["race"]["races"]


def test_a_collective_in_flight_is_read_after_its_wait_only(planted):
    (race,) = planted["asynchronous"]["early"]["races"]
    assert "what [asynchronous] writes on the stream of group 1" in race
    assert planted["asynchronous"]["late"] == CLEAN


def test_collectives_refuse_cpu_tensors_in_nccls_words(planted):
    found = planted["cpu_in_collectives"]
    for name in ("all_reduce", "all_to_all", "batch"):
        assert "No backend type associated with device type cpu" in found[name], name
    assert (found["device"], found["barrier"], found["objects"]) == ("nothing", "nothing", [{"an": "object"}])


def test_host_and_device_do_not_mix(planted):
    found = planted["mixes"]
    for name in ("sum", "product", "in place", "index", "one_hot"):
        assert "same device, but found at least two devices, cuda:0 and cpu" in found[name], name
    assert "can't convert cuda:0" in found["numpy"]
    assert {found[name] for name in ("a number", "copy", "index on the host")} == {"nothing"}


def test_tensors_say_where_they_are(planted):
    found = planted["devices"]
    assert {name: where for name, where in found["there"].items() if where != ["cuda:0", True]} == {}
    assert {name: where for name, where in found["here"].items() if where != ["cpu", False]} == {}
    assert found["hazards"] == CLEAN


def test_memory_is_counted(planted):
    assert planted["memory"] == {"grown": [0, 8192, 0, 8192, 0], "peak": 8192}


def test_events_have_times(planted):
    assert 0 <= planted["events"]["elapsed_ms"] < 1e3
    assert "enable_timing" in planted["events"]["untimed"]


def test_a_timeline_stands_on_the_hosts_clock(planted):
    """So that ranks of one machine have one clock."""
    found = planted["timeline"]
    assert max(map(abs, found["late_s"])) < 0.01
    assert min(found["lasts_s"]) >= 0.02


def test_a_serial_plan_has_one_stream(planted):
    found = planted["timeline"]
    assert found["calling"] == [True, False, False]
    assert found["calling_serially"] == [True, True, True]


def test_nothing_of_it_is_in_this_process(planted):
    assert torch.Tensor.device.__class__.__name__ == "getset_descriptor"
    assert torch.cuda.Stream.__module__.startswith("torch.")
    assert torch.ones(1).device.type == "cpu"
