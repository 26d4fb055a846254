"""The doctor names what is there and what is not, with the command that brings it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harness import caches, cli, doctor


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


def test_commands_of_slurm_without_a_cluster(monkeypatch, tmp_path):
    for name in ("sbatch", "srun", "sacct", "scancel"):
        (tmp_path / name).write_text("#!/bin/sh\necho sbatch: fatal: no configuration >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = doctor._slurm()
    assert (found.state, found.found) == ("missing", "sbatch: fatal: no configuration")


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


def gpu():
    return doctor._gpu()


def test_no_driver_is_no_harm(no_driver):
    assert (gpu().state, gpu().found) == ("missing", "no NVIDIA driver")


def test_the_torch_that_is_installed_says_what_it_needs(cuda_build):
    cuda_build(None)
    assert "a CPU build" in doctor._torch().found
    cuda_build("12.6")
    assert "built for CUDA 12.6, which needs an NVIDIA driver >= 525" in doctor._torch().found


@pytest.mark.parametrize(
    ("cuda", "build", "mask", "fails", "state", "found", "remedy"),
    [
        (13000, "13.0", None, None, "ok", "for CUDA 13.0: 2 x NVIDIA H100 PCIe", ""),
        (13000, "13.0", "1", None, "ok", "for CUDA 13.0: 1 x NVIDIA H100 PCIe", ""),
        (12080, "13.0", None, None, "broken", "built for CUDA 13.0, the driver supports 12.8", "TORCH_INDEX=cu126"),
        (13000, None, None, None, "broken", "is a CPU build", "make setup TORCH_INDEX=cu130"),
        (13000, None, "", None, "missing", "hides this machine's 2 GPUs", "unset"),
        (13000, "13.0", None, 802, "broken", "system not yet initialized", "nvidia-smi"),
        (13000, "13.0", "", None, "missing", "CUDA_VISIBLE_DEVICES='' hides this machine's 2 GPUs", "unset"),
        (13000, "13.0", "0,5", None, "broken", "'5' names no device", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_is_wrong_with_a_gpu(cards, cuda_build, cuda, build, mask, fails, state, found, remedy):
    cards("NVIDIA H100 PCIe|9.0", "NVIDIA H100 PCIe|9.0", cuda=cuda, mask=mask, fails=fails)
    cuda_build(build)
    finding = gpu()
    assert finding.state == state, finding
    assert found in finding.found
    assert remedy in finding.remedy


def test_folders_that_cannot_be_written(tmp_path):
    """In a mount namespace whose home and program are read-only: said by the doctor, and moved to scratch."""
    program = """
        from harness import caches, doctor
        print(doctor._caches())
        print(caches.use_scratch())
        print(doctor._caches().state)
        import methods.moetuner.anneal
    """
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    script = (
        'for folder in "$HOME" harness methods; do'
        ' mount --bind "$folder" "$folder" && mount -o remount,bind,ro "$folder" || exit 77; done; exec "$@"'
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    clean = {name: value for name, value in os.environ.items() if name not in caches.CACHES and "XDG" not in name}
    done = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(program)],
        env={**clean, "HOME": str(home), "TMPDIR": str(scratch)}, cwd=Path(doctor.__file__).parents[1],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("mounts are forbidden here")
    assert done.returncode == 0, done.stderr
    said, moved, then = done.stdout.splitlines()
    assert "state='missing'" in said
    assert "TRITON_CACHE_DIR" in said
    assert "NUMBA_CACHE_DIR" in moved
    assert then == "ok"
    assert list(scratch.glob("moebench-caches-*/numba/*"))  # else numba refuses the import


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
