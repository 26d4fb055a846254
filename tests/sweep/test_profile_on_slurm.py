"""A profile over the nodes of a Slurm: submitted as a sweep is, and what is measured outlives a node."""

from __future__ import annotations

import subprocess

import pytest

from harness import ledger
from harness.comm import profile as operations
from harness.errors import UserError
from harness.sweep import profile, spec, submit
from harness.sweep.states import Sweep
from tests.sweep.conftest import NODES, frozen_with, settle, until

#: a quick look: one operation, once
QUICK = {
    "harness/profiling.py": (
        'levels = {"levels": [level.name for level in cluster.levels]}',
        'levels = {"levels": [level.name for level in cluster.levels], "operations": ["a2a"], "repeats": 1}',
    ),
    "harness/bench/contention.py": ("REPEATS = 5\n", "REPEATS = 1\n"),
    "harness/bench/layer_cost.py": ("REPEATS = 5\n", "REPEATS = 1\n"),
}


def part_of(sweep: Sweep) -> dict[str, str]:
    return {digest: part for digest, _, _, part, *_ in sweep.facts["cells"]}


@pytest.mark.long
def test_a_profile_outlives_a_node(one_machine, sweep_file, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "freeze", frozen_with(QUICK))
    slurm = spec.load_cluster(sweep_file("nodes").parent / "cluster.yaml")
    kept = tmp_path / "ledger"
    job = profile.job(slurm, None, ["flat", "tutel"], "local-m512-e16k2", kept)
    sweep = submit.submit_profile(slurm, tmp_path / "nodes", job)
    until(lambda: list(sweep.folder.run_dir.glob("rows-*.parquet")), sweep)
    change = ["scontrol", "update", "nodename=n1", "reason=test"]
    subprocess.run([*change, "state=down"], check=True)
    subprocess.run([*change, "state=resume"], capture_output=True)  # refused if it has come back already, being well
    assert settle(sweep, 300) == {"ok": 4, "refused": 1}
    cells = sweep.cells().set_index("system")
    assert cells.loc["tutel", "state"] == "refused"
    assert "tutel" in cells.loc["tutel", "reason"]
    events = sweep.folder.events(0)
    begun = [part_of(sweep)[event["race"]] for event in events if event["did"] == "begin"]
    assert [event["did"] for event in events].count("start") == 2
    assert begun.count("operations") == 1  # what was finished is not measured again
    cluster = NODES.resized(2)
    made = ledger.profiled(cluster, kept)
    assert len(ledger.history(cluster.name, kept)) == 1
    assert (made.evidence, made.network["network"], made.network["wire"]) == ("emulated", "shaped", "recv_first")
    assert set(made.fits) == {"a2a.node", "a2a.rank", "a2a.flat"}
    assert set(made.products) == {"gemm", "grouped_gemm"}
    assert "intra" in made.contention["inter"]
    assert set(made.layers) == {"flat"}
    link = made.fits["a2a.node"]
    assert (
        link.refused or link.beta_s_per_byte > 0.5 * 2 / 2 / 50e6
    )  # 2 ranks share a link, half of each buffer crosses


def test_where_nodes_have_clocks_of_their_own_no_two_are_compared():
    sizes = [1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20]
    ranks = [
        {"a2a.node": {"x": sizes, "held_out": [1], "spans": [[(at, at + 1e-6 * n, 1)] for n in sizes]}}
        for at in (0.0, 5e4)
    ]
    collectives, _ = operations.fit(ranks, shared_clock=False)
    assert collectives["a2a.node"].beta_s_per_byte == pytest.approx(1e-6)
    assert collectives["a2a.node"].alpha_s == pytest.approx(0, abs=1e-9)
    seen = [("a", 10.0, 8.0, 3.0), ("a", 10.0, 8.0, 4.0), ("b", 10.0, 9.0, 2.0)]
    assert profile._foreign_cores(seen, shared_clock=False) == pytest.approx(0.7)
    assert profile._foreign_cores(seen, shared_clock=True) == 0


@pytest.mark.parametrize(
    ("nodes", "systems", "model", "message"),
    [
        (3, [], "local-m512-e16k2", "--nodes: 3: must be 1 to 2, the nodes that .*cluster.yaml describes"),
        (2, ["flatt"], "local-m512-e16k2", "unknown; did you mean 'flat'"),
        (2, ["flat"], "local-m513-e16k2", "unknown; did you mean 'local-m512-e16k2'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(sweep_file, tmp_path, nodes, systems, model, message):
    slurm = spec.load_cluster(sweep_file("bad").parent / "cluster.yaml")
    with pytest.raises(UserError, match=message):
        profile.job(slurm, nodes, systems, model, tmp_path)
