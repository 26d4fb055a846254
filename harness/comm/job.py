"""What a rank knows of the job it belongs to: its place, its groups, and how to say what it is doing."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.comm.moved import Moved
from harness.topology import Topology


class Job:
    """One rank's view of a running job. Every rank builds it, at the same point, after init_process_group.

    Groups are made once: the world, for every level the ranks inside one unit (``inner``), and for every level
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
        #: told which experts are about to change places (``harness.plan.moving``), where somebody wants to know
        self.moving: Callable[[Any], None] | None = None
        #: what of experts' parameters this rank has sent
        self.moved = Moved()
        #: True if perf_counter is one clock for all ranks (one kernel)
        self.shared_clock = shared_clock
        #: of collectives, as the world has it: a group with NCCL's own would abort its rank before a hang is told
        self._timeout = timeout
        self.world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(self.num_ranks)): self.world}
        for level in range(topology.num_levels):
            for members in (topology.inner_group, topology.rail):
                for rank in range(self.num_ranks):
                    self._make(self._groups, members(rank, level))
        #: of levels inside a node's units again, for a lane of their own
        self._deep: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for level in range(1, topology.num_levels - 1):
            for ranks in {tuple(topology.inner_group(rank, level)): None for rank in range(self.num_ranks)}:
                self._make(self._deep, list(ranks))
            for ranks in {tuple(topology.rail(rank, level + 1)): None for rank in range(self.num_ranks)}:
                self._make(self._deep, list(ranks))

    def phase(self, text: str) -> None:
        """Name what this rank does now; the supervisor quotes it when a rank fails, dies or hangs."""
        self.doing = text
        self._report_phase(text)

    def _make(self, groups: dict[tuple[int, ...], dist.ProcessGroup], ranks: list[int]) -> None:
        if tuple(ranks) not in groups and len(ranks) > 1:
            groups[tuple(ranks)] = dist.new_group(ranks, timeout=self._timeout)  # type: ignore[assignment]

    def inner(self, level: int = 0) -> dist.ProcessGroup | None:
        """The ranks of this rank's unit at ``level`` (its node for 0); None if it is alone."""
        return self._groups.get(tuple(self.topology.inner_group(self.rank, level)))

    def deep(self, ranks: list[int]) -> dist.ProcessGroup | None:
        """``inner`` and ``rail`` of levels inside a node's units, for a lane beside those that use these groups."""
        return self._deep.get(tuple(ranks))

    def rail(self, level: int = 0) -> dist.ProcessGroup | None:
        """The ranks like this one in the other units of ``level``; None if there are none."""
        return self._groups.get(tuple(self.topology.rail(self.rank, level)))
