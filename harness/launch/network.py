"""The emulated cluster's network: a namespace per node, links shaped per level, byte counters at the interfaces.

Runs inside a user, network, mount and pid namespace of its own (``launcher`` is its pid 1), so it needs no root and
the kernel removes all of it with that process. A unit of every level but the innermost owns a port at that level's
bandwidth, full duplex; units above the nodes are switches. Ranks of one node talk over its loopback, one bus that they
share: unshaped, or at the cluster's ``loopback_bytes_per_s``.

Where a node has several ports (``Level.ports``: NICs), each is a namespace of its own, with the neighbouring ranks that
go by it and no other; from one to the other they reach each other by a cable that is not shaped (``BUS``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import mmap
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness.launch import switch
from harness.launch.kernel import inside_network
from harness.specs import Cluster, Level
from harness.topology import Topology

log = logging.getLogger(__name__)

INTERFACE = "eth0"
BUS = "bus0"  # between the ports of a node
QUEUE_BYTES = 64 << 20  # lossless: more than all TCP windows that can meet at one port
SLOW_BITS_PER_S = 1e9
#: the kernel hands over packets of 64 KiB data, 68 KB with the headers of their segments; a smaller bucket makes tbf
#: cut each into 45 pieces, at 10 to 20 times the CPU
BURST_BYTES = {"slow": 72 << 10, "fast": 128 << 10}
LOOPBACK_BURST_BYTES = 140 << 10  # its packets are whole 64 KiB, so two fit
BACK_PRESSURE = 1.025  # a tbf this much above the switch's rate keeps each socket from filling the switch's queue
_BUS_MACS = 1 << 16  # of the buses; those of the links are below


class NoNetwork(RuntimeError):
    """The emulated network cannot be made here; the message is one line with the remedy."""


def burst_bytes(level: Level) -> int:
    """Token bucket of a link at ``level``."""
    if level.burst_bytes is not None:
        return level.burst_bytes
    assert level.bandwidth_bytes_per_s is not None
    return BURST_BYTES["slow" if level.bandwidth_bytes_per_s * 8 <= SLOW_BITS_PER_S else "fast"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One unit of one level of the cluster above the ranks; ``level`` -1 is the whole cluster's switch."""

    level: int
    index: int

    @property
    def namespace(self) -> str:
        return f"l{self.level}u{self.index}" if self.level >= 0 else "root"


@dataclasses.dataclass
class Network:
    """A network that stands: each rank's namespace, counters, the switch process if there is one, provenance."""

    of_ranks: list[str]
    counters: Counters
    switch_pid: int | None
    facts: dict[str, Any]


class Counters:
    """Bytes sent per link level, read from files that were opened inside each namespace."""

    def __init__(self, num_levels: int):
        self._files: list[tuple[int, int, bytes]] = []  # level, fd of its /proc/net/dev, interface
        #: int64 [num_levels - 1] in memory shared with the switch process; its entries count where no interface can
        self.switched = np.frombuffer(mmap.mmap(-1, 8 * num_levels), np.int64)[: num_levels - 1]

    def add(self, level: int, fd: int, interface: str) -> None:
        self._files.append((level, fd, interface.encode() + b":"))

    def by_port(self, level: int, interface: str = "") -> list[int]:
        """Cumulative bytes that each port of the level's units has sent, unit by unit, by all interfaces or one.
        Ports of a switch process are not told apart."""
        wanted = interface.encode() + b":" if interface else b""
        files = [(fd, name) for at, fd, name in self._files if at == level and name.endswith(wanted)]
        texts = [(os.pread(fd, 1 << 14, 0), name) for fd, name in files]
        return [int(text[text.index(name) + len(name) :].split(None, 9)[8]) for text, name in texts]

    def __call__(self) -> list[int]:
        """Cumulative bytes on the wire between ranks whose first differing coordinate is the entry's index.

        What passes a port of level i is everything that leaves that unit, so a level's own traffic is its ports'
        load less the load of the level above; loopback carries only its node's.
        """
        load = [sum(self.by_port(level)) for level in range(len(self.switched) + 1)]
        load[:-1] = np.add(load[:-1], self.switched).tolist()
        nic = load[:-1]
        return [bytes_ - (nic[i - 1] if i else 0) for i, bytes_ in enumerate(nic)] + load[-1:]


def ports_as_nodes(cluster: Cluster) -> Cluster:
    """What the links join: ``cluster`` with a node for each port of its nodes."""
    if sizes := cluster.levels[0].ranks_per_port:  # as many ranks in each node for want of a better number
        (level,) = cluster.levels
        node = level.model_copy(update={"size": len(sizes), "ranks_per_port": ()})
        return cluster.model_copy(update={"levels": (node, Level(name="rank", size=1))})
    if cluster.num_nodes == 1 or (ports := cluster.levels[-2].ports) == 1:
        return cluster
    *outer, node, rank = cluster.levels
    node = node.model_copy(update={"size": node.size * ports, "ports": 1})
    rank = rank.model_copy(update={"size": rank.size // ports})
    return cluster.model_copy(update={"levels": (*outer, node, rank)})


def build(cluster: Cluster) -> Network:
    """Make the network of ``cluster``. Raises ``NoNetwork``."""
    try:
        return _build(cluster)
    except OSError as error:
        if error.filename == switch.TAP_DEVICE:
            remedy = "latency needs it: give this user access to it, or choose a cluster without latency_s"
        else:
            remedy = "this kernel does not allow the network; choose a local cluster"
        raise NoNetwork(f"{error.filename}: {error.strerror}; {remedy}") from None


def _build(cluster: Cluster) -> Network:
    cluster, whole = ports_as_nodes(cluster), cluster
    ports = 1 if whole.levels[0].ranks_per_port else whole.shape[-1] // cluster.shape[-1]  # of a node
    last = len(whole.levels) - 1
    levels = cluster.levels[:-1]
    delayed = any(level.latency_s for level in levels)
    for level in levels:
        if level.bandwidth_bytes_per_s is None and (delayed or level.burst_bytes):
            raise NoNetwork(f"level {level.name} has no bandwidth_bytes_per_s; state it")
    topology = Topology(cluster.shape[:-1] or (1,))  # of nodes
    units = [Unit(i, u) for i in range(len(levels)) for u in range(topology.num_units(i))] or [Unit(0, 0)]
    nodes = [unit for unit in units if unit.level == topology.num_levels - 1]

    Path("/run/netns").mkdir(parents=True, exist_ok=True)
    buses = [f"bus{index}" for index in range(len(nodes) // ports)] if ports > 1 else []
    spaces = [*buses, *(unit.namespace for unit in (nodes if delayed else [Unit(-1, 0), *units]))]
    _batch("ip", [], [f"netns add {name}" for name in spaces])
    settings = _prepare_namespaces(spaces)
    counters, switch_pid, shaper = Counters(last + 1), None, "delay line and tbf"
    if delayed:
        switch_pid = _join_by_switch(nodes, cluster, counters.switched)
    elif levels:
        shaper = _join_by_veth(units, nodes, cluster)
    for index, bus in enumerate(buses):
        _join_by_bus(bus, nodes[index * ports : (index + 1) * ports])
    _address(nodes, ports)
    if cluster.loopback_bytes_per_s is not None:
        for node in nodes:
            _batch("tc", ["-n", node.namespace], [_tbf("lo", cluster.loopback_bytes_per_s, LOOPBACK_BURST_BYTES)])

    for unit in units:
        if delayed and unit not in nodes:
            continue  # its port exists only in the switch process
        fd = _within(unit.namespace, lambda: os.open("/proc/thread-self/net/dev", os.O_RDONLY))
        if levels and not delayed:
            counters.add(unit.level, fd, INTERFACE)
        if unit in nodes:
            counters.add(last, fd, "lo")
            if buses:
                counters.add(last, fd, BUS)
    facts = {
        **settings,
        "gso_max_bytes": _gso_max_bytes(nodes[0]) if levels else None,
        "shaper": shaper,
        "mtu": switch.MTU if delayed else 1500,
        "loopback_bytes_per_s": cluster.loopback_bytes_per_s,
        "levels": [
            _facts_of(level, shaped=level.ranks_per_port or level is not whole.levels[-1]) for level in whole.levels
        ],
    }
    behind = whole.levels[0].ranks_per_port or [whole.num_ranks // len(nodes)] * len(nodes)
    of_ranks = [node.namespace for node, count in zip(nodes, behind, strict=True) for _ in range(count)]
    return Network(of_ranks, counters, switch_pid, facts)


def _facts_of(level: Level, *, shaped: object) -> dict[str, Any]:
    rate = level.bandwidth_bytes_per_s if shaped else None
    return {
        "name": level.name,
        "bandwidth_bytes_per_s": rate,
        "latency_s": level.latency_s if shaped else 0.0,
        "burst_bytes": burst_bytes(level) if rate else None,
        "ports": level.ports,
    }


def _parent(unit: Unit, shape: tuple[int, ...]) -> Unit:
    return Unit(unit.level - 1, unit.index // shape[unit.level] if unit.level else 0)


def _inside(node: Unit, unit: Unit, shape: tuple[int, ...]) -> bool:
    while node.level > unit.level:
        node = _parent(node, shape)
    return node == unit


def _join_by_veth(units: list[Unit], nodes: list[Unit], cluster: Cluster) -> str:
    """A cable from every unit to the bridge in its parent, a token bucket at each end; where several nodes lie beyond,
    one that is fair to all of them, if the kernel has it. Returns what shapes."""
    links: list[str] = []
    inside: dict[str, list[str]] = {}
    arriving: dict[str, list[str]] = {}
    leaving: dict[str, tuple[list[str], list[str]]] = {}
    for name in {_parent(unit, cluster.shape).namespace for unit in units}:
        inside[name] = ["link add name bridge type bridge", "link set dev bridge up"]
    for unit in units:
        level, here = cluster.levels[unit.level], unit.namespace
        parent, port = _parent(unit, cluster.shape).namespace, f"port{unit.index}"
        links.append(f"link add name {INTERFACE} netns {here} type veth peer name {port} netns {parent}")
        joined = [] if unit in nodes else [f"link set dev {INTERFACE} master bridge"]
        inside.setdefault(here, []).extend([*joined, f"link set dev {INTERFACE} up"])
        inside[parent].extend([f"link set dev {port} master bridge", f"link set dev {port} up"])
        if level.bandwidth_bytes_per_s is not None:
            rate, burst = level.bandwidth_bytes_per_s, burst_bytes(level)
            others = [node.index for node in nodes if not _inside(node, unit, cluster.shape)]
            leaving[here] = ([_tbf(INTERFACE, rate, burst)], _fair(INTERFACE, rate, burst, others))
            arriving.setdefault(parent, []).append(_tbf(port, rate, burst))
    _batch("ip", [], links)
    for name, commands in inside.items():
        _batch("ip", ["-n", name], commands)
    for name, commands in arriving.items():
        _batch("tc", ["-n", name], commands)
    fair = True
    for name, (plain, by_turns) in leaving.items():
        if fair and by_turns:
            try:
                _batch("tc", ["-n", name], by_turns)
                continue
            except NoNetwork as error:
                fair = False
                log.warning("links are not fair to their destinations: %s", error)
                _batch("tc", ["-force", "-n", name], [f"qdisc del dev {INTERFACE} root"], may_fail=True)
        _batch("tc", ["-n", name], plain)
    return "tbf, htb by destination" if fair and any(by_turns for _, by_turns in leaving.values()) else "tbf"


def _join_by_switch(nodes: list[Unit], cluster: Cluster, sent_bytes: np.ndarray) -> int:
    """A tap device in every node; a process of ours carries frames between them, in time."""
    level = cluster.levels[-2]
    assert level.bandwidth_bytes_per_s is not None
    taps = []
    for node in nodes:
        taps.append(_within(node.namespace, lambda: switch.open_tap(INTERFACE)))
        _batch(
            "ip", ["-n", node.namespace], [f"link set dev {INTERFACE} mtu {switch.MTU}", f"link set dev {INTERFACE} up"]
        )
        rate = level.bandwidth_bytes_per_s * BACK_PRESSURE
        _batch("tc", ["-n", node.namespace], [_tbf(INTERFACE, rate, burst_bytes(level))])
    pid = os.fork()
    if pid == 0:
        try:
            switch.run(taps, cluster, sent_bytes)
        finally:
            os._exit(1)
    for tap in taps:
        os.close(tap)
    return pid


def _tbf(interface: str, rate_bytes_per_s: float, burst: int) -> str:
    bits = round(rate_bytes_per_s * 8)
    return f"qdisc add dev {interface} root tbf rate {bits}bit burst {burst} limit {QUEUE_BYTES}"


def _fair(interface: str, rate_bytes_per_s: float, burst: int, nodes: list[int]) -> list[str]:
    """A token bucket that serves several destinations in turn, as a network card does its queue pairs: in one queue for
    all of them packets for a port that is busy hold up those for idle ones. Nothing for a single destination."""
    if len(nodes) < 2:
        return []
    whole, part = round(rate_bytes_per_s * 8), round(rate_bytes_per_s * 8 / len(nodes))
    once = f"burst {burst} cburst {burst} quantum {burst}"
    found = [
        f"qdisc add dev {interface} root handle 1: htb default {10 + nodes[0]:x}",
        f"class add dev {interface} parent 1: classid 1:1 htb rate {whole}bit {once}",
    ]
    for node in nodes:
        leaf = f"{10 + node:x}"
        found += [
            f"class add dev {interface} parent 1:1 classid 1:{leaf} htb rate {part}bit ceil {whole}bit {once}",
            f"qdisc add dev {interface} parent 1:{leaf} bfifo limit {QUEUE_BYTES}",
            f"filter add dev {interface} parent 1: protocol ip u32 match ip dst {address(node)}/32 flowid 1:{leaf}",
        ]
    return found


def _join_by_bus(bus: str, ports: list[Unit]) -> None:
    """A cable from every port of a node to the bridge in ``bus``."""
    links = [(each.namespace, f"type veth peer name {each.namespace} netns {bus}") for each in ports]
    _batch("ip", [], [f"link add name {BUS} netns {name} {peer}" for name, peer in links])
    inside = ["link add name bridge type bridge", "link set dev bridge up"]
    for each in ports:
        inside += [f"link set dev {each.namespace} master bridge", f"link set dev {each.namespace} up"]
        mac = switch.mac(_BUS_MACS + each.index).hex(":")
        _batch("ip", ["-n", each.namespace], [f"link set dev {BUS} address {mac}", f"link set dev {BUS} up"])
    _batch("ip", ["-n", bus], inside)


def _address(nodes: list[Unit], ports: int) -> None:
    """Addresses, loopback, and every neighbour by heart, so that no address query runs through the links. Of the
    ``ports`` of a node one reaches the other by the bus."""
    for node in nodes:
        commands = ["link set lo up"]
        if len(nodes) > 1:
            commands += [
                f"link set dev {INTERFACE} address {switch.mac(node.index).hex(':')}",
                f"addr add {address(node.index)}/16 dev {INTERFACE}",
            ]
            for other in (each for each in nodes if each != node):
                beside, there = other.index // ports == node.index // ports, address(other.index)
                device, mac = (BUS, _BUS_MACS + other.index) if beside else (INTERFACE, other.index)
                commands.append(f"neigh replace {there} lladdr {switch.mac(mac).hex(':')} nud permanent dev {device}")
                commands += [f"route add {there}/32 dev {BUS} src {address(node.index)}"] if beside else []
        _batch("ip", ["-n", node.namespace], commands)


def address(index: int) -> str:
    """Address of node ``index`` in the emulated network."""
    return f"10.77.{index // 250}.{index % 250 + 1}"


def _prepare_namespaces(names: list[str]) -> dict[str, Any]:
    """Kernel settings of every namespace; returns what came out of it."""

    def prepare() -> str:
        net = Path("/proc/sys/net")
        _set(net / "ipv6/conf/all/disable_ipv6", "1")
        _set(net / "ipv6/conf/default/disable_ipv6", "1")
        _set(net / "ipv4/tcp_slow_start_after_idle", "0")
        _set(net / "ipv4/tcp_no_metrics_save", "1")
        _set(net / "ipv4/tcp_rmem", f"4096 {1 << 20} {16 << 20}")
        _set(net / "ipv4/tcp_wmem", f"4096 {1 << 18} {16 << 20}")
        control = net / "ipv4/tcp_congestion_control"
        # BBR paces below a token bucket's rate; cubic needs the administrator's leave, reno never does
        return "cubic" if _set(control, "cubic") else "reno" if _set(control, "reno") else control.read_text().strip()

    return {"congestion_control": {_within(name, prepare) for name in names}.pop(), "tcp_slow_start_after_idle": 0}


def _gso_max_bytes(node: Unit) -> int:
    shown = subprocess.run(
        ["ip", "-n", node.namespace, "-d", "-j", "link", "show", "dev", INTERFACE], capture_output=True, text=True
    )
    return int(json.loads(shown.stdout)[0]["gso_max_size"])


def _set(path: Path, value: str) -> bool:
    try:
        path.write_text(value)
    except OSError:
        return False
    return True


def _within(namespace: str, function: Callable[[], Any]) -> Any:
    """Call ``function`` in ``namespace`` and come back."""
    with inside_network(f"/run/netns/{namespace}"):
        return function()


def _batch(program: str, options: list[str], commands: list[str], *, may_fail: bool = False) -> None:
    done = subprocess.run(
        [program, *options, "-batch", "-"], input="\n".join(commands) + "\n", capture_output=True, text=True
    )
    if done.returncode and not may_fail:
        raise NoNetwork(f"{program} failed: {' '.join(done.stderr.split())}")
