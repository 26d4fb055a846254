"""Where chunks stand on the lanes, and how little of an exchange the outer link is idle."""

from __future__ import annotations

from harness import heldout
from harness.bench import suite
from harness.bench.physics import budgets
from harness.case import cases_of
from harness.plan.graph import INTER, INTRA
from harness.registry import system
from harness.simulation import layer_plans, simulate

EXCHANGE = """\
name: exchange
experiments:
  - cluster: emulated-2x4-balanced
    compute: stand-in
    dtype: bfloat16
    phase: exchange
    model: {num_layers: 1, hidden: 512, ffn: 512, num_experts: 64, top_k: 8, num_heads: 8, seq: 128, vocab: 256}
    workload: {name: balanced-512, tokens_per_rank: 512, generator: balanced}
    system: {name: SYSTEM, options: {degree_forward: 4, degree_backward: 4}}
"""


def lanes_of(name):
    """Tasks of the backward of an exchange in 4 chunks, in their order on the outer and on the inner link."""
    (experiment,) = suite.parse(EXCHANGE.replace("SYSTEM", name), "exchange").experiments
    tasks = layer_plans(experiment)["backward"].tasks
    names = {lane: [task.name for task in tasks if task.lane == lane] for lane in (INTER, INTRA)}
    return {lane: " ".join(each.removeprefix("backward.") for each in some) for lane, some in names.items()}


def test_the_first_chunk_turns_round_before_the_last_has_come_in():
    lanes = lanes_of("hiermoe-hd2+fsmoe")
    assert lanes[INTRA] == (
        "combine.intra[0] combine.intra[1] combine.intra[2] dispatch.intra[0] combine.intra[3] "
        "dispatch.intra[1] dispatch.intra[2] metadata.intra dispatch.intra[3]"
    )
    assert lanes[INTER] == (
        "combine[0] combine[1] combine[2] combine[3] dispatch[0] dispatch[1] dispatch[2] metadata dispatch[3]"
    )


def test_slots_keep_the_order_of_their_paper():
    gathers, scatters = (" ".join(f"{what}[{i}]" for i in range(4)) for what in ("gather", "scatter"))
    assert lanes_of("fsmoe")[INTRA] == f"{gathers} {scatters}"


def test_an_exchange_takes_hardly_longer_than_its_bytes():
    """By the links as they were profiled, without the processor's part."""
    (experiment,) = suite.parse(EXCHANGE.replace("SYSTEM", "hiermoe-hd2+fsmoe"), "exchange").experiments
    bound = budgets(experiment, system(experiment.system), cases_of(experiment))["total"].speed_of_light_s
    assert 1 < simulate(experiment, heldout.machine_of(experiment)).samples["total"][0] / bound < 1.06
