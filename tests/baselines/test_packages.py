"""The real packages behind the system face: conformance, bytes on the wire, drops, refusals."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from baselines.deepspeed import DeepSpeed, DeepSpeedDrop
from baselines.megatron import Megatron
from baselines.megatron_dispatchers import MegatronAllGather, MegatronDeepEP, MegatronHybridEP, two_hops
from baselines.tutel import Tutel, Tutel2DH
from harness import registry
from harness.bench.trials import TRIALS
from harness.errors import UserError
from harness.launch.session import Session
from harness.placement import Placement
from harness.plan.cost import Even, InTurn
from harness.plan.priced import PricedOpaque
from harness.routing.types import Routing
from harness.system import Case, System
from harness.topology import Topology
from tests.baselines.recorded import make_case

Ranks = Callable[[str], Session]
PACKAGES = [Megatron, MegatronAllGather, DeepSpeed, DeepSpeedDrop, Tutel, Tutel2DH]
TWO_BY_TWO = Topology((2, 2))

#: conformance trials that no package can run, and a word of the reason
REFUSED_BY_ALL = {
    "sigmoid-gate": "sigmoid",
    "xmoe-gate": "cosine",
    "xmoe-gate-drops": "cosine",
    "moge-gate": "MoGE",
    "moge-gate-drops": "MoGE",
    "expert-choice": "experts choose",
    "softmoe": "Soft MoE",
    "noisy-gate": "noise",
}
#: those that packages without shared experts cannot
NO_SHARED = {"shared": "no shared experts", "shared-swiglu": "no shared experts"}
#: and those that one cannot
REFUSED = {
    "megatron": {"rank-without-tokens": "without tokens", "mixtral-gate-k1": "not by 1"},
    "deepspeed": {"mixtral-gate-k1": "not by 1", "deepseek-gate": "sigmoid", "sigmoid-gate-k1": "sigmoid"} | NO_SHARED,
    "deepspeed-drop": {trial: "the model has none" for trial in TRIALS if "drops" not in trial}
    | {"mixtral-gate-k1": "not by 1", "deepseek-gate": "sigmoid", "sigmoid-gate-k1": "sigmoid"}
    | NO_SHARED,
    "tutel": {
        **NO_SHARED,
        "rank-without-tokens": "without tokens",
        "mixtral-gate-k1": "not by 1",
        "deepseek-gate": "sigmoid",
        "sigmoid-gate-k1": "sigmoid",
    },
}
REFUSED["tutel-2dh"] = REFUSED["tutel"]
REFUSED["megatron-allgather"] = (
    dict.fromkeys(("ragged", "long", "long-exchange", "shared"), "as many") | REFUSED["megatron"]
)

#: every way in which a plan's bytes depend on a case
CASES: dict[str, dict[str, Any]] = {
    "ragged": {"tokens": (16, 5, 9)},
    "skewed-bfloat16": {"generator": "zipf", "params": {"target": 2.5}, "dtype": "bfloat16"},
    "exchange-float64": {"identity_experts": True, "dtype": "float64", "model": {"top_k": 3}},
    "drops": {"generator": "zipf", "params": {"target": 2.5}, "model": {"top_k": 3, "capacity_factor": 0.8}},
    "k1": {"model": {"top_k": 1, "capacity_factor": 8.0}},
}


def installed(package: type[System]) -> type[System]:
    if (reason := package.missing()) is not None:
        pytest.skip(reason)
    return package


@pytest.mark.parametrize("cluster", ["local-2", pytest.param("local-4", marks=pytest.mark.long)])
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_agrees_with_the_oracle(session: Ranks, package: type[System], cluster: str) -> None:
    name = installed(package).name
    rows = session(cluster).call("harness.bench.conformance:check", {"systems": [name]}, timeout_s=240)[0]
    wrong = [row for row in rows if row["status"] not in ("ok", "refused")]
    assert not wrong
    refused = {row["trial"]: row["reason"] for row in rows if row["status"] == "refused"}
    expected = REFUSED[name] | REFUSED_BY_ALL
    assert refused.keys() == expected.keys()
    for trial, word in expected.items():
        assert word in refused[trial]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_sends_the_planned_bytes_over_the_wire(session: Ranks, package: type[System], case: str) -> None:
    given = CASES[case]
    if package is DeepSpeedDrop:
        given = given | {"model": {"capacity_factor": 1.0} | given.get("model", {})}
    planned_case = make_case(TWO_BY_TWO, **given)
    if (reason := installed(package).refuse(planned_case)) is not None:
        pytest.skip(reason)
    ranks = session("local-4").call(
        "tests.baselines.recorded:step", {"system": package.name, "case": given}, timeout_s=60
    )

    def sent(which: str, *collectives: str) -> np.ndarray:
        zero = np.zeros(4)
        return np.stack([sum((rank["sent"].get((which, c), zero) for c in collectives), zero) for rank in ranks])

    plan = package.planned_bytes(planned_case)
    assert plan is not None
    of_all = {"metadata", *(part for part, operation in package.collectives.items() if operation == "ag")}
    of_all -= {part for part, operation in package.collectives.items() if operation != "ag"}

    def planned(*parts: str, to_all: bool) -> np.ndarray:
        return sum((plan[part] for part in parts if part in plan and (part in of_all) == to_all), np.zeros((4, 4)))

    there = ("metadata", "dispatch", "combine")
    back = tuple(f"{part}_grad" for part in there)
    np.testing.assert_array_equal(sent("forward", "all_gather", "all_reduce"), planned(*there, to_all=True))
    np.testing.assert_array_equal(sent("forward", "all_to_all"), planned(*there, to_all=False))
    np.testing.assert_array_equal(sent("backward", "all_gather", "all_reduce"), planned(*back, to_all=True))
    np.testing.assert_array_equal(sent("backward", "all_to_all"), planned(*back, to_all=False))
    assert not any(sent(which, "past the wire").any() for which in ("forward", "backward"))
    assert all(part.any() for part in (plan["dispatch"], plan["dispatch_grad"]))
    # rows and probabilities; sums home, of rows, and of two gradients; two stages
    calls = {"megatron": 6, "megatron-allgather": 3, "tutel-2dh": 8}.get(package.name, 4)
    assert [rank["wire_calls"] for rank in ranks] == [calls] * 4
    assert all(rank["untouched"] for rank in ranks)


def test_two_stages_keep_rails_and_nodes_apart() -> None:
    """Eight ranks as 2 x 4: between nodes only like ranks talk, each with half the buffer."""
    case = make_case(Topology((2, 4)))
    linear, two_stages = (package.planned_bytes(case)["dispatch"] for package in (Tutel, Tutel2DH))
    node = np.arange(8) // 4
    between = node[:, None] != node
    assert np.count_nonzero(two_stages * between) == 8
    assert (two_stages * between).sum() == (linear * between).sum()
    assert (two_stages * ~between).sum() == 2 * (linear * ~between).sum()


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (1, 4), (2, 2, 2)])
def test_rows_of_the_flex_dispatchers_enter_a_node_once(shape: tuple[int, ...]) -> None:
    """Token by token: to each other node with an expert of it by the rank of like place, then once to each rank."""
    topology = Topology(shape)
    case = make_case(topology, dtype="bfloat16", generator="zipf", params={"target": 1.6}, model={"top_k": 4})
    num_local = topology.num_ranks // shape[0]
    expected = np.zeros((topology.num_ranks, topology.num_ranks))
    for source, experts in zip(case.routing.source, case.routing.ids, strict=True):
        ranks = {int(expert) * topology.num_ranks // 8 for expert in experts}
        for node in {rank // num_local for rank in ranks}:
            gate = node * num_local + source % num_local
            expected[source, gate] += gate != source
            for rank in ranks:
                expected[gate, rank] += rank // num_local == node and gate != rank
    rows = two_hops(case)
    np.fill_diagonal(rows, 0)
    np.testing.assert_array_equal(rows, expected)
    plan = MegatronDeepEP.planned_bytes(case)
    np.testing.assert_array_equal(plan["combine"], expected.T * 32)
    np.testing.assert_array_equal(plan["dispatch"], expected * 80)  # 32 of the row, 8 and 4 x 8 beside it, aligned
    # Hybrid-EP: a float for each expert of a node
    np.testing.assert_array_equal(MegatronHybridEP.planned_bytes(case)["dispatch"], expected * (32 + 4 * 8 // shape[0]))


@pytest.mark.parametrize("name", ["megatron-allgather", "megatron-deepep", "megatron-hybridep", "torchtitan"])
def test_rivals_of_today_are_priced_wherever_they_run(name: str) -> None:
    case = make_case(Topology((2, 4)), dtype="bfloat16", model={"ffn_type": "swiglu"})
    chosen = registry.system(name)
    assert chosen.refuse(case) is None
    layout = chosen.layout(case)
    assert isinstance(layout, PricedOpaque)
    work = layout.work("forward", "").cost
    assert isinstance(work, InTurn)
    evens = [cost for cost in work.parts if isinstance(cost, Even)]
    assert [cost.operation for cost in evens] == (["ag", "ag", "rs"] if name == "megatron-allgather" else [])
    assert not evens or evens[1].num_bytes == 8 * 16 * 16 * 2  # of all ranks, 16 tokens of 16 numbers each


def one_rank(ids: list[list[int]], num_experts: int, **model: Any) -> tuple[Case, list[torch.Tensor]]:
    """A case of one rank with these ids, and probabilities that fall along each row and from token to token."""
    routing = Routing(np.array(ids, dtype=np.int32), (len(ids),), num_experts)
    fields = {"num_experts": num_experts, "top_k": len(ids[0]), **model}
    case = make_case(Topology((1,)), model=fields, tokens=len(ids), routing=routing)
    p = torch.full((len(ids), num_experts), 0.01, dtype=torch.float64)
    for token, experts in enumerate(ids):
        for place, expert in enumerate(experts):
            p[token, expert] = 0.9 - 0.2 * place - 0.01 * token
    return case, [p]


def test_top2_drops_second_choices_first() -> None:
    # Capacity ceil(1 * 2 * 4 / 4) = 2. Expert 0 is first choice of tokens 1, 2, 3 and second choice of token 0.
    case, p = one_rank([[1, 0], [0, 2], [0, 2], [0, 3]], num_experts=4, capacity_factor=1.0)
    kept = DeepSpeedDrop.kept(case, p)[0]
    assert kept[:, 0].tolist() == [False, True, True, False]
    assert kept[0, 1]
    assert kept[:, 2].tolist() == [False, True, True, False]
    assert DeepSpeed.kept(case, p) is None


def test_topk_drops_the_lowest_probabilities() -> None:
    # Capacity ceil(0.5 * 3 * 4 / 4) = 2. Expert 0: probabilities 0.5 (third choice), 0.89, 0.88, 0.67.
    case, p = one_rank([[1, 2, 0], [0, 1, 2], [0, 2, 1], [1, 0, 3]], num_experts=4, capacity_factor=0.5)
    kept = DeepSpeedDrop.kept(case, p)[0]
    assert kept[:, 0].tolist() == [False, True, True, False]
    assert kept.sum(0).tolist() == [2, 2, 2, 1]


def test_refusals_are_data(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = Placement(Placement.contiguous(8, 4).hosts[::-1])
    assert "another placement" in Megatron.refuse(make_case(TWO_BY_TWO, placement=swapped))
    assert "2 best" in Megatron.refuse(
        make_case(TWO_BY_TWO, model={"gate": "sigmoid", "top_k": 3, "num_groups": 4, "topk_groups": 3})
    )
    assert "single expert" in Megatron.refuse(make_case(TWO_BY_TWO, model={"gate": "sigmoid", "top_k": 1}))
    lopsided = make_case(TWO_BY_TWO, model={"top_k": 1}, tokens=(40, 1))
    assert "top-1 gate caps the padding" in DeepSpeed.refuse(lopsided)
    assert "capacity_factor, and the model has none" in DeepSpeedDrop.refuse(make_case(TWO_BY_TWO))
    limited = {"capacity_factor": 1.0}
    assert "must agree" in DeepSpeedDrop.refuse(make_case(TWO_BY_TWO, model=limited, tokens=(16, 5)))
    skewed = {"generator": "zipf", "params": {"target": 2.5}, "model": limited | {"top_k": 1}}
    assert "ties" in DeepSpeedDrop.refuse(make_case(TWO_BY_TWO, **skewed))
    assert "even hidden size" in Tutel.refuse(make_case(TWO_BY_TWO, model={"hidden": 17}))
    monkeypatch.setattr(Tutel, "missing", lambda: None)
    monkeypatch.setitem(sys.modules, "tutel_custom_kernel", types.ModuleType("tutel_custom_kernel"))  # a build for CPUs
    on_a_gpu = dataclasses.replace(make_case(TWO_BY_TWO), device="cuda:0")
    assert "built without CUDA" in Tutel.refuse(on_a_gpu)
    sys.modules["tutel_custom_kernel"].inject_source = None
    assert Tutel.refuse(on_a_gpu) is None


def test_overlap_is_refused_where_tutel_ignores_it() -> None:
    overlap = {"a2a_ffn_overlap_degree": 4}
    assert "on CPU" in Tutel.refuse(make_case(TWO_BY_TWO, options=overlap))
    on_cuda = make_case(TWO_BY_TWO, options=overlap, device="cuda")
    assert Tutel.refuse(on_cuda) is None
    assert Tutel.planned_bytes(on_cuda)["dispatch"].max() % 4 == 0
    with pytest.raises(UserError, match=r"a2a_ffn_overlap_degree: 0: must be in 1\.\.32"):
        Tutel.refuse(make_case(TWO_BY_TWO, options={"a2a_ffn_overlap_degree": 0}))


def test_megatron_says_how_its_experts_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(Megatron)
    from megatron.core.transformer.moe import grouped_gemm_util

    from baselines.megatron import _expert_path

    on_cuda = make_case(TWO_BY_TWO, device="cuda", dtype="bfloat16")
    assert _expert_path(make_case(TWO_BY_TWO, dtype="bfloat16")) == (
        None,
        "sequential, one expert after another: Megatron's grouped GEMMs are for CUDA",
    )
    assert (
        "slower than Megatron's users know it: its grouped GEMMs take bfloat16"
        in _expert_path(make_case(TWO_BY_TWO, device="cuda"))[1]
    )
    monkeypatch.setattr(grouped_gemm_util, "grouped_gemm_is_available", lambda: False)
    assert "slower than Megatron's users know it: neither" in _expert_path(on_cuda)[1]
    monkeypatch.setattr(grouped_gemm_util, "grouped_gemm_is_available", lambda: True)
    assert _expert_path(on_cuda) == ("legacy", "grouped GEMM of the grouped_gemm package")


def test_missing_tutel_names_its_repository_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in Tutel.missing()
    assert "git+https://github.com/microsoft/tutel" in Tutel.missing()
    assert "megatron-core==0.16.1" in Megatron.missing()


def test_a_file_is_the_registration() -> None:
    assert {package.name for package in PACKAGES} <= registry.systems().keys()
