"""What every rank does in the tests of replicated layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from harness.bench import conformance
from harness.bench.timing import Stopwatch
from harness.bench.trials import BASE, TRIALS
from harness.comm.job import Job
from harness.comm.sparse import Chunks, Transfer, plan_sparse
from harness.plan.replicated import Policy, ReplicatedSystem
from harness.routing import planned_routing
from harness.specs import Workload
from harness.system import Case
from harness.traffic import crossing


def random_hosts(rng: np.random.Generator, owner: np.ndarray, num_ranks: int, share: float) -> np.ndarray:
    hosts = rng.random((len(owner), num_ranks)) < share
    hosts[np.arange(len(owner)), owner] = True
    return hosts


class Random(Policy):
    """Other copies for every batch."""

    def __init__(self, seed: int, share: float, revises: bool, rematerialises: bool):
        self.rng, self.share = np.random.default_rng(seed), share
        self.revises, self.rematerialises = revises, rematerialises

    def expect(self, owner: np.ndarray, num_ranks: int) -> np.ndarray:
        return random_hosts(self.rng, owner, num_ranks, self.share)

    def revise(self, hosts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return hosts | (self.rng.random(hosts.shape) < self.share)


class RandomSystem(ReplicatedSystem):
    name = "random"
    title = source = "tests"

    @classmethod
    def policy(cls, case: Case, job: Job | None) -> Policy:
        return Random(**case.options)  # type: ignore[arg-type]


def compared(job: Job, payload: dict[str, Any]) -> list[str]:
    """Ways (options) of a replicated layer on conformance trials; returns what does not equal the oracle."""
    wrong = []
    for name in payload["trials"]:
        trial = TRIALS[name]
        model = BASE.model_copy(update=trial.model)
        tokens = tuple(np.resize(payload["tokens"], job.num_ranks).tolist())
        workload = Workload(name=name, tokens_per_rank=tokens, generator=trial.generator, params=trial.params)
        routing = planned_routing(workload, model, job.topology)
        for way in payload["ways"]:
            row = conformance.compare(job, RandomSystem, model, payload["dtype"], routing, options=way)
            if row["status"] != "ok":
                wrong.append(f"{name} {way}: {row['reason'] or row['status']}")
    return wrong


def collectives(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Random placements: what arrives against plain indexing and sums, and the bytes that this rank posted."""
    rng, found = np.random.default_rng(payload["seed"]), {"wrong": [], "received": [], "planned": []}
    for trial in range(payload["trials"]):
        num_chunks = int(rng.integers(1, 20))
        owner = rng.integers(0, job.num_ranks, num_chunks)
        hosts = random_hosts(rng, owner, job.num_ranks, rng.choice([0.0, 0.2, 0.6, 1.0]))
        plan = plan_sparse(owner, hosts, job.topology)
        shapes, dtype = ((3, 2), (5,)), (torch.float64, torch.float32, torch.bfloat16)[trial % 3]
        whole = [torch.arange(num_chunks).view(-1, *[1] * len(s)) * torch.ones(s) for s in shapes]  # chunk c is all c
        own, copied = np.flatnonzero(owner == job.rank), np.flatnonzero(hosts[:, job.rank] & (owner != job.rank))
        held = [
            Chunks(own.tolist(), [w[own].to(dtype) for w in whole]),
            Chunks(copied.tolist(), [torch.full((len(copied), *s), -1.0, dtype=dtype) for s in shapes]),
        ]
        transfer = Transfer(job, plan, held).start()
        transfer.wait()
        for chunks in held:
            for tensor, w in zip(chunks.tensors, whole, strict=True):
                if not torch.equal(tensor, w[list(chunks.ids)].to(dtype)):
                    found["wrong"].append(f"gather {trial}")
        parts = [torch.full_like(t, 2.0**job.rank) for chunks in held for t in chunks.tensors]
        gradients = [Chunks(held[0].ids, parts[:2]), Chunks(held[1].ids, parts[2:])]
        Transfer(job, plan, gradients, "reduce").start().wait()
        sums = torch.as_tensor(hosts @ 2.0 ** np.arange(job.num_ranks))
        for tensor in parts[:2]:
            if not torch.equal(tensor.double(), sums[own].view(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor)):
                found["wrong"].append(f"reduce {trial}")
        found["received"].append(len(copied))
        found["planned"].append(int(plan.bytes(1.0)[:, job.rank].sum()))
    return found


def counted(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Bytes over the node link at the interfaces during a gather and its reduction, beside the planned ones."""
    rng = np.random.default_rng(0)
    owner = np.arange(payload["rows"]) % job.num_ranks
    hosts = random_hosts(rng, owner, job.num_ranks, payload["share"])
    plan = plan_sparse(owner, hosts, job.topology)
    ids = np.flatnonzero(hosts[:, job.rank])
    held = [Chunks(ids.tolist(), [torch.ones(len(ids), payload["elements"], dtype=torch.float32)])]
    watch, samples = Stopwatch(job), []
    for kind in ("gather", "reduce"):
        transfer = Transfer(job, plan, held, kind)  # type: ignore[arg-type]
        samples.append(watch.measure(0, kind, lambda transfer=transfer: transfer.run(*transfer.order)))
    matrix = plan.bytes(4.0 * payload["elements"])
    planned = [float(crossing(each, job.topology)[0]) for each in (matrix, matrix.T)]
    return {
        "counted": [sample.num_bytes[0] for sample in samples if sample.num_bytes],
        "planned": planned if job.rank == 0 else [],
        "received": float(matrix.sum(0).max()),
        "limit": plan.sparsity * 4.0 * payload["elements"] * payload["rows"],
    }
