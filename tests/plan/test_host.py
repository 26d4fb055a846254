"""Host time: taken from executed plans of any phase, and added to the same tasks of simulated ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness.plan.cost import Compute, Hold, InTurn, Timed
from harness.plan.device import Roofline
from harness.plan.graph import COMPUTE, INTER, Plan, Timeline
from harness.plan.host import beside, merged
from harness.plan.links import AlphaBeta
from harness.plan.machine import Machine
from harness.plan.simulate import simulate
from harness.specs import with_levels
from harness.topology import Topology

CLUSTER = with_levels("c", [{"name": "node", "size": 2}, {"name": "rank", "size": 2}], kind="physical")
MACHINE, TOPOLOGY = Machine(AlphaBeta(CLUSTER), Roofline(1.0, None, 1.0), "test"), Topology((2, 2))
NAMES = ("forward.gate", "forward.metadata", "forward.dispatch", "forward.experts[0]", "backward.gate")


def planned(prefixes: tuple[str, ...], ends: tuple[str, ...] = ()) -> Plan:
    """A phase's plan: layers, which are all there is of ``layer`` and ``exchange``, between what a step has once."""
    plan, last = Plan(), []
    for name in [*(f"{prefix}{name}" for prefix in prefixes for name in NAMES), *ends]:
        cost = Timed("a2a", "flat", 1.0) if name.endswith(("metadata", "dispatch")) else Hold(np.arange(1.0, 5.0))
        last = [plan.add(name, INTER if isinstance(cost, Timed) else COMPUTE, last, cost)]
    return plan


@pytest.mark.parametrize(
    ("prefixes", "ends"),
    [(("",), ()), (("layer0.", "layer11."), ("head", "optimizer")), (("layer0.", "layer1."), ("embedding", "head"))],
    ids=["layer", "train_step", "decode"],
)
def test_host_time_comes_back_from_steps_that_had_it(prefixes, ends):
    plan = planned(prefixes, ends)
    host = {name: 0.5 * i for i, name in enumerate(["forward.gate", "forward.metadata", "backward.gate", *ends], 1)}
    executed = simulate(plan, dataclasses.replace(MACHINE, host=host), TOPOLOGY)
    plain = simulate(plan, MACHINE, TOPOLOGY)
    assert beside(executed, plain) == pytest.approx(host)
    assert executed.total_s.max() == pytest.approx(plain.total_s.max() + sum(host[n] for n in ends) + len(prefixes) * 3)
    one = Timeline(plain.plan, plain.start_s.mean(-1), plain.end_s.mean(-1))
    assert beside(executed, one)["forward.gate"] == pytest.approx(0.5)  # simulated without an axis of ranks


def test_what_is_to_be_predicted_is_no_host_time():
    plan = Plan()
    for name in ("layer0.forward.moe", "layer0.forward.experts", "layer0.forward.experts[1]"):
        plan.add(name, COMPUTE)
    plan.add("layer0.forward.dispatch", INTER)
    plan.add("head", COMPUTE)
    ran = Timeline(plan, np.zeros((5, 2)), np.ones((5, 2)))
    late = Plan()
    late.add("layer0.backward.metadata", INTER)
    came = Timeline(late, np.array([[0.0, 2.0]]), np.array([[3.0, 3.5]]))  # 1.5 s after the last rank
    assert beside(came, Timeline(late, np.zeros(1), np.ones(1))) == {"backward.metadata": 0.5}
    assert beside(ran, simulate(plan, MACHINE)) == {"head": 1.0}
    assert beside(ran, Timeline(plan, np.zeros(5), np.full(5, 2.0))) == {"head": 0.0}
    assert merged([{"a": 1.0}, {"a": 2.0, "b": 4.0}]) == {"a": 1.5, "b": 4.0}


def test_tasks_that_cost_nothing_and_tasks_of_several_parts_take_the_processor_too():
    plan = Plan()
    plan.add("layer3.forward.gate", COMPUTE)
    plan.add("layer3.forward.moe", COMPUTE, (), InTurn((Timed("a2a", "flat", 1.0), Hold(2.0))))
    machine = dataclasses.replace(MACHINE, host={"forward.gate": 0.25, "forward.moe": 0.5})
    np.testing.assert_allclose(simulate(plan, machine, TOPOLOGY).end_s[:, 0], [0.25, 3.75])


def test_a_second_hop_and_the_sum_of_a_chunk_take_what_their_kind_does_and_sums_beside_links_theirs():
    plan, adding = Plan(), Timed("a2a", "flat", 1.0, summed_bytes=np.full(4, 8.0))
    plan.add("layer1.forward.metadata", INTER, (), Timed("a2a", "flat", 1.0), kind="metadata")
    plan.add("layer1.forward.metadata.intra", INTER, (), Timed("a2a", "flat", 1.0), kind="metadata")
    plan.add("layer1.forward.settle[0]", COMPUTE, (), Compute(np.zeros(4), 1, np.full(4, 2.0)), kind="restore")
    plan.add("layer1.forward.dispatch", INTER, (), Timed("a2a", "flat", 1.0))
    plan.add("layer1.forward.combine", INTER, (), adding)
    plan.add("layer1.forward.moe", COMPUTE, (), InTurn((adding, Hold(1.0))))
    machine = dataclasses.replace(MACHINE, host={"forward.metadata": 0.5, "forward.restore": 0.25})
    took = machine.durations(plan.priced(machine.priced))
    np.testing.assert_allclose(took[:, 0], [1.5, 1.5, 0.5, 1.0, 3.0, 4.0])
    known = dataclasses.replace(machine, host={**machine.host, "forward.metadata.intra": 0.125})
    assert known.durations(plan)[1, 0] == 1.125  # its own where it is known
