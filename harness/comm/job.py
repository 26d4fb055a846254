"""What a rank knows of the job it belongs to: its place, its groups, and how to say what it is doing."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.moved import Moved
from harness.groups import Groups
from harness.topology import Topology


class Job:
    """One rank's view of a running job. Every rank builds it, at the same point, after init_process_group.

    Communicators are made once: the world, for every level the ranks inside one unit (``inner``), and for every level
    the ranks with equal coordinates elsewhere (``rail``). Each is a communicator of its own, so that collectives
    of different levels progress independently.
    """

    def __init__(
        self,
        topology: Topology,
        device: torch.device | str = "cpu",
        report_phase: Callable[[str], None] | None = None,
        counters: Callable[[], list[int]] | None = None,
        shared_clock: bool = True,
        progress: Callable[[dict[str, Any]], None] | None = None,
        timeout: datetime.timedelta | None = None,
        failing: Callable[[BaseException], None] | None = None,
        recovered: Callable[[], None] | None = None,
        log_path: Path | str = "",
    ):
        self.topology = topology
        self.device = torch.device(device)
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        if self.num_ranks != topology.num_ranks:
            raise ValueError(f"{self.num_ranks} ranks run but the topology {topology.shape} has {topology.num_ranks}")
        self._report_phase = report_phase or (lambda text: None)
        self.doing = ""  # the last phase
        self.log_path = log_path  # where tracebacks of this rank are
        #: tells at once that this rank has raised, in whichever thread; if the call then does not end, because the
        #: others wait for this rank, or it for them, all are ended with that reason a few seconds later
        self.failing: Callable[[BaseException], None] = failing or (lambda error: None)
        #: tells that all ranks have agreed to go on without what has failed
        self.recovered: Callable[[], None] = recovered or (lambda: None)
        #: bytes sent so far over each link level's interfaces, summed over the cluster; None where not countable
        self.counters = counters
        #: hands a small plain message to whoever waits for this call
        self.progress: Callable[[dict[str, Any]], None] = progress or (lambda message: None)
        self._told: dict[str, Callable[[Any], None] | None] = {"moving": None}
        #: what of experts' parameters this rank has sent
        self.moved = Moved()
        #: True if perf_counter is one clock for all ranks (one kernel)
        self.shared_clock = shared_clock
        #: of collectives, as the world has it: a group with NCCL's own would abort its rank before a hang is told
        self._timeout = timeout
        self.world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        #: of a ``part``: the ranks that hold the same experts as this one, in the other parts; None if there are none
        self.replicas: dist.ProcessGroup | None = None
        self._parts: dict[Groups, Job] = {}
        self._connect(np.arange(self.num_ranks)[None], {tuple(range(self.num_ranks)): self.world})

    def part(self, groups: Groups | None) -> Job:
        """Collective the first time: this rank's view of its expert-parallel group, as if that were a job of its own;
        None: of all ranks."""
        if groups is None:
            return self
        if groups not in self._parts:
            found = copy.copy(self)
            group, found.rank = groups.of_rank(self.rank)
            found.topology, found.num_ranks = groups.topology, groups.size
            worlds: dict[tuple[int, ...], dist.ProcessGroup] = {}
            for ranks in groups.members.tolist():
                worlds[tuple(ranks)] = dist.new_group(ranks, timeout=self._timeout)  # type: ignore[assignment]
            replicas: dict[tuple[int, ...], dist.ProcessGroup] = {}
            for ranks in groups.members.T.tolist():
                self._make(replicas, ranks)
            found.world = worlds[tuple(groups.members[group].tolist())]
            found.replicas = replicas.get(tuple(groups.members[:, found.rank].tolist()))
            found._connect(groups.members, worlds)
            self._parts[groups] = found
        return self._parts[groups]

    def _connect(self, jobs: np.ndarray, worlds: dict[tuple[int, ...], dist.ProcessGroup]) -> None:
        """Collective: make the communicators of all ``jobs`` [jobs, ranks of one], of which this is one, by the levels
        of their topology. ``worlds``: those of all ranks of each."""
        (self.members,) = (ranks for ranks in jobs.tolist() if dist.get_rank() in ranks)
        self._groups = dict(worlds)
        #: of levels inside a node's units again, for a lane of their own
        self._deep: dict[tuple[int, ...], dist.ProcessGroup] = {}
        topology, every = self.topology, range(self.num_ranks)
        for job in jobs:
            for level in range(topology.num_levels):
                for members in (topology.inner_group, topology.rail):
                    for rank in every:
                        self._make(self._groups, job[members(rank, level)].tolist())
            for level in range(1, topology.num_levels - 1):
                for ranks in {tuple(topology.inner_group(rank, level)): None for rank in every}:
                    self._make(self._deep, job[list(ranks)].tolist())
                for ranks in {tuple(topology.rail(rank, level + 1)): None for rank in every}:
                    self._make(self._deep, job[list(ranks)].tolist())

    @property
    def moving(self) -> Callable[[Any], None] | None:
        """Told which experts are about to change places (``harness.plan.moving``), where somebody wants to know."""
        return self._told["moving"]

    @moving.setter
    def moving(self, told: Callable[[Any], None] | None) -> None:
        self._told["moving"] = told  # of all parts

    def phase(self, text: str) -> None:
        """Name what this rank does now; the supervisor quotes it when a rank fails, dies or hangs."""
        self.doing = text
        self._report_phase(text)

    def _make(self, groups: dict[tuple[int, ...], dist.ProcessGroup], ranks: list[int]) -> None:
        if tuple(ranks) not in groups and len(ranks) > 1:
            groups[tuple(ranks)] = dist.new_group(ranks, timeout=self._timeout)  # type: ignore[assignment]

    def inner(self, level: int = 0) -> dist.ProcessGroup | None:
        """The ranks of this rank's unit at ``level`` (its node for 0); None if it is alone."""
        return self._groups.get(self._named(self.topology.inner_group(self.rank, level)))

    def deep(self, ranks: list[int]) -> dist.ProcessGroup | None:
        """``inner`` and ``rail`` of levels inside a node's units, for a lane beside those that use these groups."""
        return self._deep.get(self._named(ranks))

    def rail(self, level: int = 0) -> dist.ProcessGroup | None:
        """The ranks like this one in the other units of ``level``; None if there are none."""
        return self._groups.get(self._named(self.topology.rail(self.rank, level)))

    def _named(self, ranks: list[int]) -> tuple[int, ...]:
        """Ranks of this job as communicators know them: by their numbers in the whole one."""
        return tuple(self.members[rank] for rank in ranks)
