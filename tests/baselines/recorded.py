"""What the tests of the package adapters run on every rank: one forward and backward, its traffic recorded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.bench import conformance
from harness.comm import wire
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.registry import system
from harness.routing import planned_routing
from harness.specs import Model, Workload
from harness.system import Case
from harness.topology import Topology

MODEL = Model(name="small", num_layers=1, hidden=16, ffn=24, num_experts=8, top_k=2)


def make_case(topology: Topology, **given: Any) -> Case:
    """A case over MODEL; ``given``: model (changed fields), tokens (one number, or a tuple repeated over the ranks),
    generator, params, and fields of Case."""
    model = MODEL.model_copy(update=given.pop("model", {}))
    tokens = tuple(np.resize(given.pop("tokens", 16), topology.num_ranks).tolist())
    generator, params = given.pop("generator", "uniform"), given.pop("params", {})
    workload = Workload(name="small", tokens_per_rank=tokens, generator=generator, params=params)
    routing = planned_routing(workload, model, topology)
    placement = Placement.contiguous(model.num_experts, topology.num_ranks)
    return Case(
        **(
            {"model": model, "dtype": "float32", "topology": topology, "placement": placement, "routing": routing}
            | given
        )
    )


def step(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of ``payload["system"]`` on ``make_case(**payload["case"])``.

    Returns bytes sent to each rank by (pass, collective), float64 [num_ranks]; how often the receive-first wire ran;
    and what the adapter left in the process: whether ``torch`` still is torch for others."""
    chosen = system(payload["system"])
    case = make_case(job.topology, **payload["case"])
    assert chosen.refuse(case) is None
    weights = Weights(case.model, case.dtype)
    xs, dys = conformance.draw_tokens(weights, case.routing, case.model.takes_routing)
    layer = chosen.build(case, job, weights)
    x = xs[job.rank].requires_grad_()
    state = layer.prepare(x) if case.identity_experts else None
    calls, sent = wire.num_calls, {}
    with record(job, "forward", sent):
        y = layer.exchange(x, state) if case.identity_experts else layer(x)
    with record(job, "backward", sent):
        y.backward(dys[job.rank])
    untouched = sys.modules["torch"] is torch and torch.cuda.__name__ == "torch.cuda"
    return {"sent": sent, "wire_calls": wire.num_calls - calls, "untouched": untouched}


@contextlib.contextmanager
def record(job: Job, name: str, sent: dict[tuple[str, str], np.ndarray]) -> Iterator[None]:
    """Add the payload bytes that this rank sends to each other rank, below torch.distributed's functions (some
    packages keep those from import time), at the process group's methods.

    An all-gather counts its input and an all-reduce its tensor, once for every other rank of the group."""

    def wrap(method: str, collective: str, by_peer: Callable[..., dict[int, int]]) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, method)

        def recorded(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            row = sent.setdefault((name, collective), np.zeros(job.num_ranks))
            for peer, num_bytes in by_peer(group, *args).items():
                if (rank := dist.get_global_rank(group, peer)) != job.rank:
                    row[rank] += num_bytes
            return original(group, *args, **kwargs)

        return recorded

    def everyone(group: dist.ProcessGroup, tensor: torch.Tensor) -> dict[int, int]:
        return dict.fromkeys(range(group.size()), tensor.nbytes)

    all_gather = "all_gather_single" if hasattr(dist.ProcessGroup, "all_gather_single") else "_allgather_base"  # < 2.12
    methods = {
        "send": wrap("send", "all_to_all", lambda group, tensors, peer, tag: {peer: tensors[0].nbytes}),
        "alltoall_base": wrap("alltoall_base", "past the wire", lambda group, output, own, *_: everyone(group, own)),
        all_gather: wrap(all_gather, "all_gather", lambda group, out, own, *_: everyone(group, own)),
        "allreduce": wrap("allreduce", "all_reduce", lambda group, tensors, *_: everyone(group, tensors[0])),
    }
    before = {method: vars(dist.ProcessGroup)[method] for method in methods}
    try:
        for method, function in methods.items():
            setattr(dist.ProcessGroup, method, function)
        yield
    finally:
        for method, function in before.items():
            setattr(dist.ProcessGroup, method, function)
