"""Hecate's planners, options and memory."""

from __future__ import annotations

import numpy as np
import pytest

from harness import memory, presets, registry
from harness.case import case_of
from harness.errors import UserError
from harness.specs import Experiment
from harness.topology import Topology
from methods.hecate.materialise import assign_slots_by_load, materialise
from methods.hecate.policy import Options
from methods.hecate.shard import shard

CONTIGUOUS = np.repeat(np.arange(8), 2)  # of 16 experts on 8 ranks


def test_with_memory_enough_the_loaded_experts_are_everywhere():
    load = np.array([0, 9, 3, 8, 1, 0, 7, 2] * 2)
    hosts = materialise(CONTIGUOUS, load, 4, 4, Topology((2, 4)))
    assert set(np.flatnonzero(hosts.all(1))) == {1, 3, 9, 11}
    assert hosts.sum() == 4 * 8 + 12
    assert (materialise(CONTIGUOUS, load, 99, 99, Topology((2, 4))).sum(1) == np.where(load > 0, 8, 1)).all()
    assert (materialise(CONTIGUOUS, load, 0, 5, Topology((2, 4))).sum(1) == 1).all()
    assert (materialise(CONTIGUOUS, 0 * load, 4, 4, Topology((2, 4))).sum(1) == 1).all()


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8, 1)])
def test_with_little_memory_replicas_go_by_load_and_to_other_nodes_first(shape):
    topology, rng = Topology(shape), np.random.default_rng(0)
    node = topology.unit_of(0)
    for _ in range(20):
        load = rng.integers(1, 100, 16)
        hosts = materialise(CONTIGUOUS, load, 6, 1, topology)
        assert ((hosts.sum(0) - 2) <= 1).all()  # one copy a device
        assert hosts[np.arange(16), CONTIGUOUS].all()
        top = np.argsort(-load, kind="stable")
        copies = hosts.sum(1) - 1
        assert (np.diff(copies[top]) <= 0).all()
        assert copies[top[6:]].sum() == 0
        first = top[0]
        nodes = len(set(node[hosts[first]]))
        assert nodes == min(shape[0], copies[first] + 1)


def test_slots_follow_the_load():
    assert assign_slots_by_load(np.array([50.0, 25, 15, 10]), 8, 7).tolist() == [5, 2, 1, 0]
    assert assign_slots_by_load(np.array([98.0, 1, 1]), 8, 7).tolist() == [7, 1, 0]
    assert assign_slots_by_load(np.array([10.0] * 4), 6, 7).tolist() == [2, 2, 1, 1]
    assert assign_slots_by_load(np.array([10.0] * 4), 99, 7).tolist() == [7] * 4
    assert assign_slots_by_load(np.array([10.0] * 4), 0, 7).tolist() == [0] * 4


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
def test_shards_have_as_much_for_everyone_and_even_the_light_experts_out(shape):
    topology, rng = Topology(shape), np.random.default_rng(1)
    loads = rng.zipf(1.5, (6, 16)).clip(max=1000)
    before = np.tile(CONTIGUOUS, (6, 1))
    owner = shard(loads, 4, topology, before)
    assert (np.bincount(owner.ravel(), minlength=8) == 12).all()
    light = np.argsort(-loads, axis=1, kind="stable")[:, 4:]
    heaviest = np.take_along_axis(loads, light, 1).max(1)
    first = int(heaviest.argmax())  # the layer that is placed while every slot is free
    of_rank = np.bincount(owner[first, light[first]], loads[first, light[first]], 8)
    # longest first, node by node: no device has more than the even share and one expert
    assert of_rank.max() <= loads[first, light[first]].sum() / 8 + loads[first, light[first]].max()
    assert len({tuple(np.bincount(row, minlength=8)) for row in owner}) > 1  # uneven in a layer
    assert (shard(loads, 4, topology, owner) == owner).all()  # nothing moves without a reason


def test_loads_of_one_layer_do_not_weigh_in_the_next():
    loads = np.array([[100, 1, 1, 1], [5, 5, 5, 5], [0, 0, 0, 0]])
    owner = shard(loads, 0, Topology((2, 1)), np.tile([0, 0, 1, 1], (3, 1)))
    assert owner[0].tolist() == [0, 1, 1, 1]
    assert np.bincount(owner[1]).tolist() == [2, 2]


def test_what_does_not_divide_is_refused():
    with pytest.raises(UserError, match="num_layers x num_experts: 15: does not divide over 8 ranks"):
        shard(np.ones((1, 15)), 2, Topology((2, 4)), np.zeros((1, 15), dtype=int))


def experiment(system: str = "hecate", **changes) -> Experiment:
    fields = {
        "model": presets.model("gpt-tiny-moe").model_copy(update={"num_layers": 4}),
        "cluster": presets.cluster("emulated-2x4"),
        "workload": {"name": "w", "tokens_per_rank": 128, "generator": "uniform"},
        "system": system,
        "phase": "train_step",
    }
    return Experiment.parse(fields | changes, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": 9}, "options.t: 9: must be a whole number from 0 to 8"),
        ({"t": -1}, "options.t: -1: must be a whole number from 0 to 8"),
        ({"m": True}, "options.m: True: must be a whole number from 0 to 8"),
        ({"window": 0}, "options.window: 0: must be a whole number from 1"),
        ({"reshard_every": 1.5}, "options.reshard_every: 1.5: must be a whole number from 0"),
        ({"calibrate": "yes"}, "options.calibrate: 'yes': must be true or false"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    given = experiment(options=options)
    with pytest.raises(UserError, match=message):
        Options.of(case_of(given))


def test_a_shard_that_does_not_fit_is_refused_with_the_arithmetic():
    small = presets.cluster("emulated-2x4").model_copy(update={"device_memory_bytes": 13_000_000})
    whole = {"t": 8, "m": 8}
    for options, fits in (({"t": 0}, True), ({"t": 8}, True), (whole, False), (whole | {"rematerialise": True}, True)):
        given = experiment(cluster=small, options=options)
        found = memory.refusal(given, registry.system("hecate"), case_of(given))
        assert (found is None) == fits, found
    given = experiment(cluster=small, options={"t": 8, "m": 8})
    said = memory.refusal(given, registry.system("hecate"), case_of(given))
    assert said is not None
    assert said.startswith("a shard of ")
    assert "copies and their gradients" in said
    assert "GB a device" in said


def test_as_many_are_materialised_as_a_device_has_memory_for():
    """m, where it is not given: what is left beside state and activations holds copies of all layers and one layer's
    gradients."""
    known = registry.system("hecate")
    for options, most in (({"t": 8}, 8), ({"t": 8, "m": 3}, 3), ({"t": 8, "rematerialise": True}, 8)):
        given = experiment(cluster=presets.cluster("emulated-2x4"), options=options)
        assert known.policy(case_of(given), None).m == most  # nothing is stated
    free = None
    for copies in (0, 1, 5):
        given = experiment(cluster=presets.cluster("emulated-2x4"), options={"t": 8})
        each = memory.expert_bytes(given.model, given.dtype)
        limit = 10**8 if free is None else int(10**8 - free + copies * (given.model.num_layers + 1) * each) + 1
        tight = presets.cluster("emulated-2x4").model_copy(update={"device_memory_bytes": limit})
        case = case_of(experiment(cluster=tight, options={"t": 8}))
        if free is None:
            free = case.room_bytes
            continue
        assert known.policy(case, None).m == copies
        assert memory.refusal(experiment(cluster=tight, options={"t": 8}), known, case) is None
