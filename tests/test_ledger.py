"""Calibrations are kept, found by their cluster, and handed out only where they may be believed."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from harness import ledger, presets
from harness.comm.fits import Fit, GemmFit, judge
from harness.errors import UserError
from harness.ledger import Calibration

SIZES = np.array([1.0, 2.0, 3.0, 4.0, 8.0]) * 65536
BAD = [1.0, 3.0, 3.0, 1.0, 1.0]


def calibration(name="emulated-2x4", date="2020-01-01T00:00:00+00:00", **changes):
    cluster = presets.cluster(name)
    times = {level.name: 1e-3 + 1e-9 * (i + 1) * SIZES for i, level in enumerate(cluster.levels)}
    times["flat"] = 2e-3 + 5e-9 * SIZES
    if len(cluster.levels) > 2:
        times["intra"] = 3e-3 + 7e-9 * SIZES
    fits = {f"{op}.{scope}": judge(Fit, SIZES, t, (1,)) for op in ("a2a", "ag") for scope, t in times.items()}
    fields = {
        "profiled": cluster,
        "evidence": "emulated",
        "network": {"network": "shaped"},
        "date": date,
        "provenance": {"versions": {"torch": "1"}},
        "foreign_cores": 0.1,
        "fits": fits,
        "products": {"gemm": judge(GemmFit, SIZES, 1e-12 * SIZES, (1,))},
    }
    return Calibration(**fields | changes)


def test_the_newest_is_found_and_the_older_kept(tmp_path):
    cluster = presets.cluster("emulated-2x4")
    assert ledger.latest(cluster, tmp_path) is None
    first, second = calibration(), calibration(date="2020-01-02T00:00:00+00:00")
    path = ledger.record(first, tmp_path)
    before = path.read_text().splitlines()[1].rstrip(",")
    assert ledger.record(second, tmp_path) == path == tmp_path / "emulated-2x4.json"
    assert ledger.latest(cluster, tmp_path) == second
    assert ledger.history("emulated-2x4", tmp_path) == [first, second]
    assert path.read_text().splitlines()[1].rstrip(",") == before
    assert {each.name for each in tmp_path.iterdir()} == {path.name, ledger.LOCK}  # nothing half-written beside it


def test_another_cluster_of_the_same_name_is_another_cluster(tmp_path):
    ledger.record(calibration(), tmp_path)
    given = presets.cluster("emulated-2x4")
    outer = given.levels[0].model_copy(update={"bandwidth_bytes_per_s": 1e6})
    assert ledger.latest(given.model_copy(update={"levels": (outer, given.levels[1])}), tmp_path) is None


def test_a_cluster_priced_as_the_presets_of_real_ones_are():
    found = calibration().cluster()
    assert set(found.collectives) == {"a2a.inter", "a2a.intra", "ag.inter", "ag.intra"}
    assert found.collectives["a2a.inter"].beta_s_per_byte == pytest.approx(1e-9)
    assert found.collectives["ag.intra"].beta_s_per_byte == pytest.approx(2e-9)
    assert found.gemm.beta_s_per_mac == pytest.approx(1e-12)
    assert found.levels == presets.cluster("emulated-2x4").levels


def test_inside_a_node_of_several_levels_is_a_scope_of_its_own():
    found = calibration("emulated-2x2x2").cluster(["a2a.inter", "a2a.intra", "a2a.node", "a2a.flat"])
    betas = {key: each.beta_s_per_byte for key, each in found.collectives.items()}
    assert betas == pytest.approx({"a2a.inter": 1e-9, "a2a.intra": 7e-9, "a2a.node": 2e-9, "a2a.flat": 5e-9})
    assert found.gemm is None


def test_a_refused_fit_is_not_handed_out_and_its_points_are_shown():
    fits = calibration().fits | {"ag.rank": judge(Fit, SIZES, BAD, (1,))}
    poor = calibration(fits=fits)
    with pytest.raises(UserError, match=r"ag.intra: refused, r2 .* below 0.9; .*65536: 1000.000 ms; 131072: 3000"):
        poor.cluster()
    assert set(poor.cluster(["a2a.inter"]).collectives) == {"a2a.inter"}  # others are as good as before
    with pytest.raises(UserError, match=r"rs.inter: None: was not measured; known are a2a.flat"):
        poor.cluster(["rs.inter"])


def test_slowdown_of_computing_and_of_waiting():
    contention = {
        "inter": {"compute": 0.5, "stand-in": 0.0, "intra": 0.1},
        "compute": {"inter": 0.7},
        "stand-in": {"inter": 0.01},
    }
    found = calibration(contention=contention)
    assert found.slowdown() == {"inter": {"compute": 0.5, "intra": 0.1}, "compute": {"inter": 0.7}}
    assert found.slowdown("stand-in") == {"inter": {"compute": 0.0, "intra": 0.1}, "compute": {"inter": 0.01}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"schema_version": 1}', "is damaged"),
        ('{"schema_version": 1, "calibrations": [{"date": "x"}]}', "is damaged"),
        (json.dumps({"schema_version": 99, "calibrations": []}), "schema version 99, newer than 1; update moebench"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error_and_stays_as_it_is(tmp_path, text, says):
    path = tmp_path / "emulated-2x4.json"
    path.write_text(text)
    for use in (
        lambda: ledger.latest(presets.cluster("emulated-2x4"), tmp_path),
        lambda: ledger.record(calibration(), tmp_path),
    ):
        with pytest.raises(UserError, match=says) as raised:
            use()
        assert "\n" not in str(raised.value)
    assert path.read_text() == text


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"ledger: .*choose a folder"):
        ledger.record(calibration(), tmp_path / "file")


def nfs(handle: int, how: int) -> None:
    """As NFS has it (flock(2)): exclusive only on what is open for writing, and no folder is."""
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    flock(handle, how)


flock = fcntl.flock


def add(folder, date):
    ledger.record(calibration(date=date), folder)


def test_of_those_who_add_at_once_all_are_kept_even_on_nfs(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", nfs)
    monkeypatch.setattr(ledger, "NO_LOCKS", set())
    several = multiprocessing.get_context("fork")
    adding = [several.Process(target=add, args=(tmp_path, f"2020-01-0{day}T00:00:00+00:00")) for day in range(1, 9)]
    for process in adding:
        process.start()
    for process in adding:
        process.join()
    assert len(ledger.history("emulated-2x4", tmp_path)) == 8


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    ledger.record(calibration(), tmp_path)
    assert ledger.history("emulated-2x4", tmp_path) == [calibration()]


def test_what_ships_is_known_in_any_folder_behind_what_was_profiled_there(tmp_path, monkeypatch) -> None:
    cluster = presets.cluster("emulated-2x4")
    monkeypatch.chdir(tmp_path)
    shipped = ledger.history("emulated-2x4", ledger.SHIPPED)[-1]
    assert ledger.latest(cluster) == shipped
    assert ledger.latest(cluster, tmp_path / "mine") is None  # another one that was asked for
    own = calibration("emulated-2x4")
    ledger.record(own)
    assert ledger.latest(cluster) == own
    assert ledger.latest(presets.cluster("emulated-4x2")) is not None
    assert {path.name for path in Path("results/ledger").iterdir()} == {"emulated-2x4.json", ledger.LOCK}
