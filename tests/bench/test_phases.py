"""Every system in every phase on four ranks: it has a time, or it is refused with a reason. Those phases that no other
test drives with all systems come first; with the trials before them, and in all phases, it takes a minute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from harness import registry
from harness.specs import SERVING, Cluster, Experiment, Model, Workload

MODEL = Model(name="small", num_layers=2, hidden=32, ffn=32, num_experts=8, top_k=2, num_heads=4, seq=8, vocab=64)
PHASES = ("exchange", "layer", "train_step", "prefill", "decode")
#: what drops by the tokens of a batch has room for all, since one token is decoded at a time
MODELS = {"deepspeed-drop": {"capacity_factor": 8.0}}


def experiment(system: str, phase: str, cluster: Cluster) -> Experiment:
    return Experiment(
        model=MODEL.model_copy(update=MODELS.get(system, {})),
        cluster=cluster,
        workload=Workload(name="small", tokens_per_rank=16, generator="uniform"),
        system=system,
        phase=phase,  # type: ignore[arg-type]
        dtype="float32",
        backward=phase not in SERVING,
    )


def races(phases: Iterable[str], cluster: Cluster) -> list[list[dict[str, Any]]]:
    """Of every phase a race of all systems that are installed."""
    names = [name for name, system in registry.systems().items() if system.missing() is None]
    return [[experiment(name, phase, cluster).model_dump(mode="json") for name in names] for phase in phases]


def judge(experiments: list[dict[str, Any]], outcomes: list[dict[str, Any]]) -> None:
    for cell, outcome in zip(experiments, outcomes, strict=True):
        here = f"{cell['system']} {cell['phase']}: {outcome['reason']}"
        assert outcome["status"] in ("ok", "refused"), here
        assert bool(outcome["samples"]) == (outcome["status"] == "ok"), here
        assert bool(outcome["reason"]) == (outcome["status"] == "refused"), here


def test_every_system_serves_or_is_refused(session):
    ranks = session("local-4")
    asked = races(SERVING, ranks.cluster)
    for answers in ranks.call("tests.bench.phases_on_ranks:run", {"races": asked}):
        for experiments, outcomes in zip(asked, answers, strict=True):
            judge(experiments, outcomes)


@pytest.mark.long
@pytest.mark.minutes
def test_every_system_is_timed_or_refused_in_every_phase(session):
    ranks = session("local-4")
    for experiments in races(PHASES, ranks.cluster):
        for answer in ranks.call(
            "harness.bench.race:run_race", {"experiments": experiments, "repeats": 1, "warmup": 1}
        ):
            judge(experiments, list(answer["cells"].values()))
