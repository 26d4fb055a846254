"""What may refuse, and nothing else does: the trials of ``moebench check`` that a system cannot run."""

from __future__ import annotations

import numpy as np
import pytest

from harness import checks, cli, registry
from harness.bench.trials import BASE, TRIALS
from harness.placement import Placement
from harness.routing import planned_routing
from harness.specs import Workload
from harness.system import Case
from harness.topology import Topology

MOGE = {"moge-gate", "moge-gate-drops"}
NO_GATES = {"xmoe-gate", "xmoe-gate-drops", *MOGE, "expert-choice", "softmoe", "noisy-gate", "mixtral-gate-k1"}
SIGMOID = {"deepseek-gate", "sigmoid-gate", "sigmoid-gate-k1"}
SHARED = {"shared", "shared-swiglu"}
TUTEL = {*NO_GATES, *SIGMOID, *SHARED, "rank-without-tokens"}
MEGATRON = {*NO_GATES, "sigmoid-gate", "rank-without-tokens"}
#: of real packages alone; native systems run all that there is
MAY_REFUSE = {
    "deepspeed": {*NO_GATES, *SIGMOID, *SHARED},
    "deepspeed-drop": TRIALS.keys() - {"drops", "long-drops"},  # others have no capacity factor, which it needs
    "megatron": MEGATRON,
    "megatron-allgather": {*MEGATRON, "ragged", "long", "long-exchange", "shared"},  # as many tokens on every rank
    "megatron-deepep": TRIALS.keys() - {"long-exchange"},  # in formats other than bfloat16
    "megatron-hybridep": TRIALS.keys() - {"long-exchange"},
    "torchtitan": set(TRIALS),
    "tutel": TUTEL,
    "tutel-2dh": TUTEL,
}


@pytest.mark.parametrize("name", registry.systems())
def test_what_is_refused_is_on_the_list(name: str) -> None:
    topology, refused = Topology((2, 2)), set()
    for trial, spec in TRIALS.items():
        model = BASE.model_copy(update=spec.model)
        tokens = tuple(np.resize(spec.tokens, topology.num_ranks).tolist())
        workload = Workload(name=trial, tokens_per_rank=tokens, generator=spec.generator, params=spec.params, seed=7)
        routing = planned_routing(workload, model, topology)
        placement = Placement.contiguous(model.num_experts, topology.num_ranks)
        cases = [
            Case(model, dtype, topology, placement, routing, identity_experts=spec.identity_experts)
            for dtype in spec.dtypes
        ]
        refused |= {trial for case in cases if registry.system(name).refuse(case)}
    assert refused == MAY_REFUSE.get(name, set())
    assert name not in MAY_REFUSE or registry.system(name).kind == "package"


def test_strict_makes_a_refusal_exit_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "system": "flat",
            "trial": trial,
            "dtype": "float64",
            "status": status,
            "reason": "",
            "errors": {},
            "tolerance": 1,
        }
        for trial, status in (("uniform", "ok"), ("drops", "refused"))
    ]
    statuses = []
    for found in (rows, rows[:1], rows[1:]):
        monkeypatch.setattr(checks, "check_systems", lambda *_, found=found: found)
        for more in ((), ("--strict",)):
            monkeypatch.setattr("sys.argv", ["moebench", "check", "flat", *more])
            try:
                cli.main()
            except SystemExit as exit_:
                statuses.append(exit_.code or 0)
    assert statuses == [0, 1, 0, 0, 1, 1]
