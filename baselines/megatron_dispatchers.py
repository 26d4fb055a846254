"""Megatron-Core's MoE layer with its other token dispatchers.

``megatron-allgather``: every rank gets all tokens and computes those of its experts; a reduce-scatter brings the sums
home. Its collectives have equal parts, whatever the routing.

``megatron-deepep``, ``megatron-hybridep``: Megatron's ``flex`` dispatcher over the kernels of DeepEP, or of its
Hybrid-EP branch. A row crosses to a node once, to the rank of like place there, and that rank forwards it inside the
node, once to each rank with an expert of it; sums come back the same way. It is the exchange of ``hiermoe-hd2`` in
fused kernels. These are CUDA kernels: elsewhere both are priced only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from baselines import _packages
from baselines.megatron import Megatron
from harness.comm.job import Job
from harness.dtypes import row_bytes
from harness.errors import bad
from harness.layer.weights import Weights
from harness.specs import DTYPE_BYTES
from harness.system import Case, MoELayer

SOURCE_META_BYTES, ALIGNED = 8, 16  # DeepEP, csrc/kernels/legacy/internode.cu: SourceMeta, get_num_bytes_per_token


class MegatronAllGather(Megatron):
    name: ClassVar[str] = "megatron-allgather"
    title: ClassVar[str] = "Megatron-Core MoE layer, all-gather dispatcher (real package)"
    dispatcher: ClassVar[dict[str, str]] = {"moe_token_dispatcher_type": "allgather"}
    options: ClassVar[dict[str, str]] = {}
    collectives = {
        "metadata": "ag",
        "dispatch": "ag",
        "combine": "rs",
        "combine_grad": "ag",
        "dispatch_grad": "rs",
        "metadata_grad": "rs",
    }

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        if (reason := super().refuse(case)) is not None:
            return reason
        return "megatron-core's all-gather dispatcher needs as many tokens on every rank" if case.ragged else None

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray]:
        """What each rank contributes to, or takes from, each other: of every token one byte an expert (the routing map)
        and one probability an expert, and its row; outputs and their gradients have the router's format."""
        model, num_ranks = case.model, case.topology.num_ranks
        tokens, wide = case.routing.tokens[0], 8 if case.dtype == "float64" else 4
        sizes = {
            "metadata": (1 + wide) * model.num_experts,
            "dispatch": model.hidden * DTYPE_BYTES[case.dtype],
            "combine": model.hidden * wide,
            "combine_grad": model.hidden * wide,
            "dispatch_grad": model.hidden * DTYPE_BYTES[case.dtype],
            "metadata_grad": wide * model.num_experts,
        }
        whole = np.full((num_ranks, num_ranks), tokens)
        return {part: _packages.off_diagonal(whole * size) for part, size in sizes.items()}


class MegatronDeepEP(Megatron):
    name: ClassVar[str] = "megatron-deepep"
    title: ClassVar[str] = "Megatron-Core MoE layer, flex dispatcher over DeepEP's kernels (real package)"
    source: ClassVar[str] = "megatron-core: MoEFlexTokenDispatcher; github.com/deepseek-ai/DeepEP"
    dispatcher: ClassVar[dict[str, str]] = {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "deepep",
    }
    options: ClassVar[dict[str, str]] = {}  # "Shared expert overlap is not supported in Flex Token Dispatcher."
    stages: ClassVar[tuple[str, ...]] = ("inter", "intra")
    module: ClassVar[str] = "deep_ep"
    remedy: ClassVar[str] = (
        "its repository is github.com/deepseek-ai/DeepEP (CUDA, Ampere or newer): pip install git+https://github.com/"
        "deepseek-ai/DeepEP"
    )

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or _packages.missing(cls.module, "deep_ep", cls.remedy)

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        if case.dtype != "bfloat16":
            return f"DeepEP's kernels move rows of bfloat16, not {case.dtype}"
        if case.topology.num_ranks == 1:
            return "megatron-core's flex dispatcher needs several ranks"
        return super().refuse(dataclasses.replace(case, exchange_dtype=None))  # its kernels take rows of float8, too

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray]:
        """Rows by both hops in one matrix: a rail's ranks between the nodes, all ranks inside one."""
        rows, sent = two_hops(case), row_bytes(case, "dispatch")
        there, back = cls.beside(case, sent)
        return {
            "metadata": _packages.off_diagonal(cls.told(case)),
            "dispatch": _packages.off_diagonal(rows * (sent + there)),
            "combine": _packages.off_diagonal(rows.T * row_bytes(case, "combine")),
            "combine_grad": _packages.off_diagonal(rows * row_bytes(case, "combine_grad")),
            "dispatch_grad": _packages.off_diagonal(rows.T * (row_bytes(case, "dispatch_grad") + back)),
        }

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        if case.exchange_dtype is not None:
            remedy = "is priced and not run: Megatron-Core gives DeepEP rows of bfloat16; leave it out, or simulate"
            raise bad("exchange_dtype", case.exchange_dtype, remedy)
        return super().build(case, job, weights)

    @classmethod
    def told(cls, case: Case) -> np.ndarray:
        """Bytes [num_ranks, num_ranks]: how many rows come, of a rank and of each of its experts."""
        num_ranks = case.topology.num_ranks
        return np.full((num_ranks, num_ranks), 4 * (1 + case.model.num_experts / num_ranks))

    @classmethod
    def beside(cls, case: Case, sent: int) -> tuple[int, int]:
        """Bytes beside a row of ``sent``: its source, k experts and k weights; beside its gradient k weights."""
        whole = sent + SOURCE_META_BYTES + 8 * case.model.top_k
        return math.ceil(whole / ALIGNED) * ALIGNED - sent, 4 * case.model.top_k


class MegatronHybridEP(MegatronDeepEP):
    name: ClassVar[str] = "megatron-hybridep"
    title: ClassVar[str] = "Megatron-Core MoE layer, flex dispatcher over Hybrid-EP's kernels (real package)"
    source: ClassVar[str] = "megatron-core: MoEFlexTokenDispatcher; github.com/deepseek-ai/DeepEP, branch hybrid-ep"
    dispatcher: ClassVar[dict[str, str]] = {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "hybridep",
    }
    remedy: ClassVar[str] = (
        "its repository is github.com/deepseek-ai/DeepEP, branch hybrid-ep (CUDA, Hopper or newer): pip install "
        "git+https://github.com/deepseek-ai/DeepEP@hybrid-ep"
    )

    @classmethod
    def told(cls, case: Case) -> np.ndarray:
        """The routing map: a byte for each token and expert, to every rank."""
        map_bytes = np.asarray(case.routing.tokens)[:, None] * case.model.num_experts
        return np.repeat(map_bytes, case.topology.num_ranks, axis=1)

    @classmethod
    def beside(cls, case: Case, sent: int) -> tuple[int, int]:
        """A probability for each expert of the node that a row goes to, and back."""
        probabilities = 4 * case.model.num_experts // case.topology.shape[0]
        return probabilities, probabilities


def two_hops(case: Case) -> np.ndarray:
    """Rows from each rank to each, float64 [num_ranks, num_ranks]: of a token one to each other node with an expert of
    it, to the rank of like place, and from there (in its own node from its own rank) one to each rank with one. Where
    a sample stands for the tokens, each counts for as many as it stands for."""
    topology, few = case.topology, case.routing.sample
    num_ranks, num_nodes = topology.num_ranks, topology.shape[0]
    num_local = num_ranks // num_nodes
    wanted = np.zeros((len(few.ids), num_ranks), dtype=bool)
    wanted[np.arange(len(few.ids))[:, None], case.placement.owner[few.ids]] = True
    source, place = few.source, few.source % num_local
    stands_for = np.asarray(case.routing.tokens)[source] / np.asarray(few.tokens)[source]
    found = np.zeros((num_ranks, num_ranks))
    for node, here in enumerate(wanted.reshape(len(wanted), num_nodes, num_local).swapaxes(0, 1)):
        gate = node * num_local + place  # where a token's row enters the node
        crosses = here.any(1) & (source // num_local != node)
        np.add.at(found, (source[crosses], gate[crosses]), stands_for[crosses])
        for local, mine in enumerate(here.T):
            np.add.at(found[:, node * num_local + local], gate[mine], stands_for[mine])
    return found
