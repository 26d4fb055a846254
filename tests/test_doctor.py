"""The doctor names what is there and what is not, with the command that brings it."""

from __future__ import annotations

import json
import sys

import pytest

from harness import cli, doctor


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def here():
    return by_name(doctor.examine())


def test_what_is_required_is_here(here):
    for name in ("python", "dependencies", "torch", "disk"):
        assert here[name].state == "ok", here[name]


def test_every_real_package_has_a_line(here):
    from harness.registry import systems

    for name, system in systems().items():
        if system.kind == "package":
            finding = here[f"system {name}"]
            assert finding.state == ("missing" if system.missing() else "ok")
            assert finding.state == "ok" or finding.remedy


def test_whatever_is_not_ok_says_what_to_do(here):
    assert all(finding.remedy for finding in here.values() if finding.state != "ok")


def test_without_iproute_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(doctor.examine())
    for name in ("ip", "tc"):
        assert found[name].state == "missing"
        assert found[name].remedy == "apt-get install iproute2"
    assert found["namespaces"].state == found["shaped link"].state == "missing"
    assert found["git"].state == "missing"


def test_a_full_disk_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 60)
    assert by_name(doctor.examine())["disk"].state == "broken"


def test_a_missing_package_names_its_remedy(monkeypatch):
    from harness import registry

    class Absent:
        name, kind = "absent", "package"

        @staticmethod
        def missing():
            return "absent is not installed; pip install absent"

    class Half(Absent):
        name = "half"

        @staticmethod
        def missing():
            raise OSError("libabsent.so: cannot open")

    monkeypatch.setattr(registry, "systems", lambda: {"absent": Absent, "half": Half})
    found = by_name(doctor.examine())
    absent = found["system absent"]
    assert (absent.state, absent.found) == ("missing", "absent is not installed")
    assert "-m pip install absent" in absent.remedy
    assert "libabsent.so" in found["system half"].found


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("missing", 0), ("broken", 1)])
def test_exit_status(monkeypatch, capsys, state, status):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("thing", state, "found", "remedy")])
    monkeypatch.setattr(sys, "argv", ["moebench", "doctor", "--json"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert (exit_.value.code or 0) == status
    assert json.loads(capsys.readouterr().out) == [
        {"name": "thing", "state": state, "found": "found", "remedy": "remedy"}
    ]
