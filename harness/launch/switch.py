"""Rate and latency in user space, for kernels without a delaying queue discipline: a switch of tap devices.

One process holds the tap of every node. A frame is put on each port of its path as soon as that port is free
(cut-through: the first bit moves on at once), stays as long as its bits take there, and is handed over one latency
per link level later. Frames are large (``MTU``), so that few of them carry a full line.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import struct
import time
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from harness.launch.kernel import exact_timers
from harness.specs import Cluster
from harness.topology import Topology

MTU = 16000
TAP_DEVICE = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_MAC_BYTES = 6


def mac(index: int) -> bytes:
    """Hardware address of node ``index``."""
    return b"\x02\x00" + struct.pack(">I", index + 1)


def open_tap(interface: str) -> int:
    """Make a tap device in the present network namespace; returns its non-blocking file descriptor."""
    fd = os.open(TAP_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _IFF_TAP | _IFF_NO_PI))
    return fd


class Fabric:
    """When a frame that enters now comes out: ports with a rate, level by level."""

    def __init__(self, cluster: Cluster):
        levels = cluster.levels[:-1]
        nodes = Topology(tuple(level.size for level in levels))
        self._between = nodes.level_between.tolist()
        self._unit = [nodes.unit_of(i).tolist() for i in range(nodes.num_levels)]
        self._s_per_byte = [1.0 / (level.bandwidth_bytes_per_s or float("inf")) for level in levels]
        self._latency_s = [level.latency_s for level in levels]
        self._free = [[[0.0] * nodes.num_units(i) for i in range(nodes.num_levels)] for _ in ("up", "down")]
        self.sent_bytes = [0] * nodes.num_levels  # by level of the ports that it went up

    def deliver_at(self, source: int, target: int, num_bytes: int, now: float) -> float:
        """Put a frame on the ports between two nodes; returns the time at which it arrives."""
        outermost, innermost = self._between[source][target], len(self._unit) - 1
        start, latency, slowest = now, 0.0, 0.0
        for level in range(innermost, outermost - 1, -1):
            start = self._occupy(0, level, self._unit[level][source], num_bytes, start)
            self.sent_bytes[level] += num_bytes
        for level in range(outermost, innermost + 1):
            start = self._occupy(1, level, self._unit[level][target], num_bytes, start)
            latency += self._latency_s[level]
            slowest = max(slowest, self._s_per_byte[level])
        return start + num_bytes * slowest + latency

    def _occupy(self, way: int, level: int, unit: int, num_bytes: int, ready: float) -> float:
        free = self._free[way][level]
        start = max(ready, free[unit])
        free[unit] = start + num_bytes * self._s_per_byte[level]
        return start


def run(taps: Sequence[int], cluster: Cluster, sent_bytes: np.ndarray) -> NoReturn:
    """Carry frames between ``taps`` for ever. ``sent_bytes``: int64 [num_levels - 1] in shared memory, kept current."""
    exact_timers()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # wakes before the ranks, which are SCHED_BATCH
    # a frame waits for this process to wake twice: when it comes, which cannot be measured, and when it is due
    lead_s = 2 * _wake_up_s()
    fabric = Fabric(cluster)
    node_of = {mac(index): index for index in range(len(taps))}
    source_of = {fd: index for index, fd in enumerate(taps)}
    on_the_way: list[tuple[float, int, int, bytes]] = []  # arrival, tie-breaker, target, frame
    num_frames = 0
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for fd in select.select(taps, [], [], wait)[0]:
            try:
                frame = os.read(fd, MTU + 64)
            except BlockingIOError:
                continue
            target = node_of.get(frame[:_MAC_BYTES])
            if target is None or target == source_of[fd]:
                continue  # every neighbour is known by heart: no broadcasts
            num_frames += 1
            arrival = fabric.deliver_at(source_of[fd], target, len(frame), time.monotonic()) - lead_s
            heapq.heappush(on_the_way, (arrival, num_frames, target, frame))
            sent_bytes[:] = fabric.sent_bytes
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(on_the_way)
            os.write(taps[target], frame)


def _wake_up_s() -> float:
    """How late a timed wait ends on this machine at its quietest."""
    late_s = []
    for _ in range(31):
        start = time.monotonic()
        select.select([], [], [], 200e-6)
        late_s.append(time.monotonic() - start - 200e-6)
    return min(late_s)
