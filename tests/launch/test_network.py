"""The emulated network: rates, latencies and counters per level, measured with real bytes."""

from __future__ import annotations

import os
import shutil
import tempfile

import numpy as np
import pytest

from harness import presets, registry
from harness.launch import network, switch
from harness.launch import session as session_module
from harness.launch.session import open_session
from harness.plan.links import lines_of
from harness.specs import with_levels
from harness.topology import Topology
from harness.traffic import direction_bytes
from tests.baselines.recorded import make_case
from tests.launch.clusters import BYTES_PER_S, DELAYED, EMULATED, LOCAL, NESTED, NESTED_DELAYED, RAILS

WORK = "tests.launch.work:"
MIB = 1 << 20
WIRE_PER_PAYLOAD = 1514 / 1448  # Ethernet, IP and TCP headers with time stamps


@pytest.fixture
def shaped(session):
    def get(cluster):
        ranks = session(cluster, preload=())
        if not ranks.network["shaped"]:
            pytest.skip(ranks.network["reason"])
        return ranks

    return get


def best_time(ranks, target, num_bytes, reps=4):
    """Seconds from the first rank's start to the last one's end, of the quietest repetition."""
    ranks_seen = ranks.call(WORK + "send", {"source": 0, "target": target, "bytes": num_bytes, "reps": reps})
    pairs = zip(ranks_seen[0], ranks_seen[target], strict=True)
    return min(max(end, end_) - min(start, start_) for (start, end, _), (start_, end_, _) in pairs)


@pytest.mark.timed
@pytest.mark.parametrize("cluster", [EMULATED, DELAYED], ids=lambda cluster: cluster.name)
def test_the_link_has_its_rate(shaped, cluster):
    size = 4 * MIB
    seconds = best_time(shaped(cluster), cluster.num_ranks - 1, size)
    credit = 2 * 72 * 1024 if cluster is EMULATED else 0  # the buckets of both ends are full after a pause
    ideal = (size * WIRE_PER_PAYLOAD - credit) / BYTES_PER_S
    assert 0.98 * ideal - 2e-3 <= seconds <= 1.10 * ideal


@pytest.mark.timed
def test_loopback_in_a_node_is_fast(shaped):
    assert best_time(shaped(EMULATED), 1, 4 * MIB) < 4 * MIB / BYTES_PER_S / 4


@pytest.mark.timed
def test_a_nodes_ranks_share_its_loopback(shaped):
    slow, size = EMULATED.model_copy(update={"name": "slow-loopback", "loopback_bytes_per_s": BYTES_PER_S / 2}), 2 * MIB
    seconds = best_time(shaped(slow), 1, size)
    ideal = (size - 140 * 1024) / (BYTES_PER_S / 2)
    assert 0.98 * ideal - 2e-3 <= seconds <= 1.10 * ideal


@pytest.mark.timed
def test_each_level_of_a_nested_network_has_its_rate(shaped):
    ranks, size = shaped(NESTED), 4 * MIB
    within, across = best_time(ranks, 2, size), best_time(ranks, 4, size)
    assert within == pytest.approx(size * WIRE_PER_PAYLOAD / 100e6, rel=0.12)
    assert across == pytest.approx(size * WIRE_PER_PAYLOAD / BYTES_PER_S, rel=0.12)


@pytest.mark.parametrize(
    ("cluster", "target", "level"),
    [
        *[(EMULATED, 2, 0), (EMULATED, 1, 1), (NESTED, 6, 0), (NESTED, 2, 1), (NESTED, 1, 2)],
        *[(RAILS, 6, 0), (RAILS, 1, 1), (RAILS, 2, 1)],
        *[(DELAYED, 2, 0), (NESTED_DELAYED, 2, 0), (NESTED_DELAYED, 1, 1)],
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_counters_know_the_level(shaped, cluster, target, level):
    payload = {"source": 0, "target": target, "bytes": 8 * MIB}
    ((_, _, counted),) = shaped(cluster).call(WORK + "send", payload)[target]
    for index, num_bytes in enumerate(counted):
        expected = 8 * MIB if index == level else 0
        assert expected <= num_bytes <= expected + 0.02 * 8 * MIB


@pytest.mark.timed
def test_each_port_of_a_node_has_its_rate(shaped):
    """Ranks 0 and 1 share a port out, ranks 6 and 7 one in; the bus between ports is not shaped."""
    ranks, size = shaped(RAILS), 2 * MIB

    def seconds(*flows):
        return min(ranks.call(WORK + "send_together", {"flows": flows, "bytes": size, "reps": 3})[0])

    ideal = size * WIRE_PER_PAYLOAD / BYTES_PER_S
    assert seconds((0, 4), (2, 6)) == pytest.approx(ideal, rel=0.12)
    assert seconds((0, 4), (1, 6)) == pytest.approx(2 * ideal, rel=0.12)
    assert seconds((0, 6), (2, 7)) == pytest.approx(2 * ideal, rel=0.12)
    assert seconds((0, 2), (1, 3)) < ideal / 4


@pytest.mark.parametrize(
    ("name", "system"),
    [("emulated-2x2x2-rails", "flat"), ("emulated-2x2x2-rails", "hiermoe-hd2"), ("emulated-4-2-2", "flat")],
)
def test_each_port_sends_what_is_planned_of_its_ranks(shaped, name, system):
    cluster = presets.cluster(name)
    topology = Topology(cluster.shape)
    case = {"model": {"hidden": 2048}, "generator": "zipf", "params": {"target": 2.0}}
    case["tokens"] = (64, 32, 96, 0, 8, 48, 24, 40)
    sent = shaped(cluster).call(WORK + "exchange", {"system": system, "case": case}, timeout_s=60)[0]
    matrix = direction_bytes(registry.system(system).planned_bytes(make_case(topology, **case)), "forward")
    for line in lines_of(cluster):
        unit = line.units(topology)
        planned = np.bincount(line.port_of(topology), np.where(unit[:, None] == unit, 0, matrix).sum(1))
        assert len(planned) == 2 or len(set(planned)) > 1  # what goes there comes back
        for counted, wanted in zip(sent[line.level], planned, strict=True):
            assert 0.99 * wanted <= counted <= 1.06 * wanted + 32 * 1024


def test_ranks_of_unequal_nodes_reach_each_other_inside(shaped):
    """Ranks 0 to 3, 4 and 5, 6 and 7."""
    ranks = shaped(presets.cluster("emulated-4-2-2"))
    for source, target, out in ((0, 3, [0, 0, 0]), (4, 5, [0, 0, 0]), (3, 4, [1, 0, 0]), (6, 0, [0, 0, 1])):
        payload = {"flows": [(source, target)], "bytes": 8 * MIB}
        for counted, wanted in zip(ranks.call(WORK + "sent_together", payload)[0], out, strict=True):
            assert wanted * 8 * MIB <= counted <= wanted * 8 * MIB + 0.02 * 8 * MIB


@pytest.mark.timed
def test_counters_are_cheap_and_absent_on_local_clusters(session, shaped):
    assert min(shaped(EMULATED).call(WORK + "time_counters")) < 1e-3
    ((_, _, counted),) = session(LOCAL).call(WORK + "send", {"source": 0, "target": 1, "bytes": 8})[1]
    assert counted is None


@pytest.mark.timed
@pytest.mark.parametrize(("cluster", "one_way_s"), [(DELAYED, 1e-3), (NESTED_DELAYED, 3e-3)])
def test_latency_is_added_once_per_level(shaped, cluster, one_way_s):
    round_trips = sorted(shaped(cluster).call(WORK + "ping", {"reps": 100})[0])
    assert round_trips[10] / 2 == pytest.approx(one_way_s, rel=0.10)


def test_no_namespaces_means_unshaped_with_a_reason(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(session_module, "IN_NAMESPACES", ["sh", "-c", "echo unshare failed: not permitted >&2; exit 1"])
    with open_session(EMULATED, log_dir=tmp_path) as ranks:
        assert ranks.network["shaped"] is False
        assert ranks.network["network"] == "unshaped"
        assert "unshare failed: not permitted" in ranks.network["reason"]
        assert "sysctl" in ranks.network["reason"]
        assert len(ranks.call(WORK + "total")) == 4
    assert "runs unshaped" in caplog.text


def test_no_tc_means_unshaped_with_a_reason(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for program in ("unshare", "ip", "sh"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program) or program)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_session(EMULATED, log_dir=tmp_path) as ranks:
        assert ranks.network["shaped"] is False
        assert ranks.network["reason"] == "tc not found; install util-linux and iproute2"
    assert not list(tmp_path.glob("moebench-*"))


@pytest.mark.timed
def test_a_link_to_several_nodes_is_fair_to_them_where_the_kernel_can(shaped, tmp_path, monkeypatch):
    """Three nodes: a tc that knows no htb leaves plain token buckets; the rate is the same."""
    three = with_levels(
        "three", [{"name": "node", "size": 3, "bandwidth_bytes_per_s": BYTES_PER_S}, {"name": "rank", "size": 1}],
        kind="emulated",
    )  # fmt: skip
    ranks, size = shaped(three), 4 * MIB
    assert ranks.network["shaper"] == "tbf, htb by destination"
    ideal = size * WIRE_PER_PAYLOAD / BYTES_PER_S
    assert 0.9 * ideal <= best_time(ranks, 2, size) <= 1.10 * ideal
    assert shaped(EMULATED).network["shaper"] == "tbf"
    (tmp_path / "tc").write_text(
        f'#!/bin/sh\ni=$(cat)\ncase "$i" in *htb*) exit 1;; esac\necho "$i" | {shutil.which("tc")} "$@"\n'
    )
    (tmp_path / "tc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with open_session(three, log_dir=tmp_path / "log") as plain:
        assert plain.network["shaper"] == "tbf"
        assert 0.9 * ideal <= best_time(plain, 2, size) <= 1.10 * ideal


def test_no_tap_device_means_no_latency(monkeypatch):
    def refuse(cluster):
        raise PermissionError(13, "Permission denied", switch.TAP_DEVICE)

    monkeypatch.setattr(network, "_build", refuse)
    with pytest.raises(network.NoNetwork, match=r"^/dev/net/tun: Permission denied; latency needs it"):
        network.build(DELAYED)


def test_a_command_of_the_network_that_fails_is_quoted():
    with pytest.raises(network.NoNetwork, match=r"^ip failed: .*Command failed"):
        network._batch("ip", [], ["link set dev no-such-device up"])


def test_bucket_follows_the_rate():
    def level(**fields):
        return with_levels("c", [{"name": "node", "size": 2, **fields}], kind="emulated").levels[0]

    assert network.burst_bytes(level(bandwidth_bytes_per_s=125e6)) == 72 * 1024
    assert network.burst_bytes(level(bandwidth_bytes_per_s=126e6)) == 128 * 1024
    assert network.burst_bytes(level(bandwidth_bytes_per_s=1e6, burst_bytes=9000)) == 9000


def test_fabric_is_cut_through_and_fair_to_both_ports():
    fabric = switch.Fabric(NESTED_DELAYED)
    frame = 10_000
    # one frame across racks: the slowest port's time once, both latencies
    assert fabric.deliver_at(0, 2, frame, 1.0) == pytest.approx(1.0 + frame / BYTES_PER_S + 3e-3)
    # the next in the same direction queues for the rack's port; one inside the other rack does not
    assert fabric.deliver_at(0, 2, frame, 1.0) == pytest.approx(1.0 + 2 * frame / BYTES_PER_S + 3e-3)
    assert fabric.deliver_at(3, 2, frame, 5.0) == pytest.approx(5.0 + frame / 100e6 + 1e-3)
    assert fabric.sent_bytes == [2 * frame, 3 * frame]
