"""Who exchanges tokens with whom, and who shares an expert: the expert-parallel (EP) and expert-sharding (ESP) groups
of a rank, and the all-to-all algorithms that FSMoE's Dispatch and Combine may take (arXiv 2501.10714, section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.comm.journey import all_to_all


@dataclasses.dataclass(frozen=True, eq=False)
class Mesh:
    """``num_ep`` groups of ``num_esp`` ranks; each holds ``1 / num_ep`` of the experts, each of its ranks a shard.

    ``across``: parts [num_ep, ...] to every EP rank of this rank's shard -> parts from every one."""

    num_ep: int
    ep_index: int
    num_esp: int
    esp_index: int
    esp_group: dist.ProcessGroup | None
    across: Callable[[torch.Tensor], torch.Tensor]


def node_mesh(job: Job) -> Mesh:
    """As the paper assumes: an expert's shards fill a node (N_ESP = ranks of a node), experts differ between nodes."""
    nodes = job.topology.shape[0]
    num_local = job.num_ranks // nodes
    rail = job.rail(0)

    def across(parts: torch.Tensor) -> torch.Tensor:
        return all_to_all(parts, [1] * nodes, [1] * nodes, rail)

    node = int(job.topology.unit_of(0)[job.rank])
    return Mesh(nodes, node, num_local, job.rank % num_local, job.inner(0), across)


def rank_mesh(job: Job, algorithm: str) -> Mesh:
    """Whole experts (N_ESP = 1), tokens exchanged among all ranks by ``algorithm``."""
    run = ALGORITHMS[algorithm]
    return Mesh(job.num_ranks, job.rank, 1, 0, None, lambda parts: run(job, parts))


def _flat(job: Job, parts: torch.Tensor) -> torch.Tensor:
    """One all-to-all over all ranks (NCCL's)."""
    each = [1] * job.num_ranks
    return all_to_all(parts, each, each, job.world if job.num_ranks > 1 else None)


def _two_dimensional(job: Job, parts: torch.Tensor) -> torch.Tensor:
    """2DH (Tutel, DeepSpeed-MoE): inside the node to the rank with the destination's local index, then between nodes
    among like ranks: fewer and larger messages cross."""
    nodes = job.topology.shape[0]
    num_local = job.num_ranks // nodes
    by_local = parts.view(nodes, num_local, *parts.shape[1:]).transpose(0, 1).contiguous()  # [L to, nodes to, ...]
    here = all_to_all(by_local, [1] * num_local, [1] * num_local, job.inner(0))  # [L from, nodes to, ...]
    by_node = here.transpose(0, 1).contiguous()  # [nodes to, L from, ...]
    received = all_to_all(by_node, [1] * nodes, [1] * nodes, job.rail(0))  # [nodes from, L from, ...]
    return received.view(parts.shape)


def _one_dimensional(job: Job, parts: torch.Tensor) -> torch.Tensor:
    """1DH (Hetu): a node's ranks hand all to its first, the first ranks exchange, and hand out what came."""
    nodes = job.topology.shape[0]
    num_local = job.num_ranks // nodes
    inner, rail = job.inner(0), job.rail(0)
    if inner is None:
        return _flat(job, parts)
    leader = dist.get_process_group_ranks(inner)[0]
    leads = job.rank == leader
    gathered = parts.new_empty(num_local, *parts.shape) if leads else None  # [L from, ranks to, ...]
    dist.gather(parts, list(gathered) if gathered is not None else None, dst=leader, group=inner)
    handed = None
    if gathered is not None:
        by_node = gathered.view(num_local, nodes, num_local, *parts.shape[1:]).transpose(0, 1).contiguous()
        arrived = all_to_all(by_node, [1] * nodes, [1] * nodes, rail)  # [nodes from, L from, L to, ...]
        handed = arrived.flatten(0, 1).transpose(0, 1).contiguous()  # [L to, ranks from, ...]
    received = torch.empty_like(parts)
    dist.scatter(received, list(handed) if handed is not None else None, src=leader, group=inner)
    return received


ALGORITHMS = {"flat": _flat, "1dh": _one_dimensional, "2dh": _two_dimensional}
