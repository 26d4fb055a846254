"""Small clusters for the tests of this folder."""

from __future__ import annotations

from harness.specs import with_levels

BYTES_PER_S = 50e6  # 400 Mbit/s


def node(size: int = 2, **fields):
    return {"name": "node", "size": size, "bandwidth_bytes_per_s": BYTES_PER_S, **fields}


LOCAL = with_levels("local-test", [{"name": "node", "size": 2}, {"name": "rank", "size": 2}], kind="local")
EMULATED = with_levels("emulated-test", [node(), {"name": "rank", "size": 2}], kind="emulated")
RAILS = with_levels("rails-test", [node(ports=2), {"name": "rank", "size": 4}], kind="emulated")  # two ranks a NIC
NESTED = with_levels(
    "nested-test",
    [
        {"name": "rack", "size": 2, "bandwidth_bytes_per_s": BYTES_PER_S},
        node(bandwidth_bytes_per_s=100e6),
        {"name": "rank", "size": 2},
    ],
    kind="emulated",
)
DELAYED = with_levels("delayed-test", [node(latency_s=1e-3), {"name": "rank", "size": 2}], kind="emulated")
NESTED_DELAYED = with_levels(
    "nested-delayed-test",
    [
        {"name": "rack", "size": 2, "bandwidth_bytes_per_s": BYTES_PER_S, "latency_s": 2e-3},
        node(bandwidth_bytes_per_s=100e6, latency_s=1e-3),
        {"name": "rank", "size": 1},
    ],
    kind="emulated",
)
