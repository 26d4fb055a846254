"""The two environments ask for the same things, what is imported is declared, and a wheel holds its data."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OWN = {"harness", "baselines", "methods", "tests"}
# Importable by another name than the distribution's, where that is not installed here to be asked.
DISTRIBUTION_OF = {"yaml": "pyyaml", "megatron": "megatron-core", "deepspeed": "deepspeed"}
BY_HAND = {
    "tutel",
    "tutel_custom_kernel",
}  # on no package index; environment.yml and moebench doctor name its repository


def canonical(requirement: str) -> str:
    """``Foo_Bar >= 1`` and ``foo-bar>=1`` are the same requirement."""
    name, rest = re.fullmatch(r"\s*([A-Za-z0-9._-]+)\s*(.*?)\s*", requirement).groups()
    return re.sub(r"[-_.]+", "-", name).lower() + rest.replace(" ", "")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> set[str]:
    """Requirements of pyproject.toml: the core's and every extra's, without the extras' references to each other."""
    asked = [
        *project()["dependencies"],
        *(line for extra in project()["optional-dependencies"].values() for line in extra),
    ]
    return {canonical(line) for line in asked if not line.startswith("moebench[")}


def python_files() -> Iterator[Path]:
    for folder in sorted(OWN):
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Top-level modules that a file imports anywhere in it, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_conda_and_pip_ask_for_the_same_packages_and_versions():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (python,) = [entry for entry in entries if isinstance(entry, str) and entry.startswith("python")]
    (pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    assert python.removeprefix("python") == project()["requires-python"]
    assert pip[-1] == "-e ."
    assert {canonical(line) for line in pip[:-1]} == declared()


def test_torch_is_in_one_range_everywhere():
    (torch,) = [line for line in project()["dependencies"] if line.startswith("torch")]
    makefile = (ROOT / "Makefile").read_text()
    assert f"TORCH_RANGE := {torch}\n" in makefile
    pinned = re.search(r"^TORCH := torch==(.*)$", makefile, re.MULTILINE)[1]
    first, end, now = (tuple(map(int, text.split("."))) for text in (*re.findall(r"[\d.]+", torch), pinned))
    assert first <= now < end


PIP = "-m pip install --disable-pip-version-check"
WHEELS = "https://download.pytorch.org/whl"


@pytest.mark.parametrize(
    ("asked", "driver", "before", "pip"),
    [
        ("", "", "", [f"{PIP} torch==2.13.0"]),
        ("", "cu126", "", [f"{PIP} torch>=2.11,<2.14 --index-url {WHEELS}/cu126"]),
        ("pypi", "cu126", "", [f"{PIP} torch==2.13.0"]),
        ("cu130", "cu126", "", [f"{PIP} torch>=2.11,<2.14 --index-url {WHEELS}/cu130"]),
        ("https://mirror/simple", "", "", [f"{PIP} torch>=2.11,<2.14 --index-url https://mirror/simple"]),
        ("/opt/wheels", "", "", [f"{PIP} torch>=2.11,<2.14 --no-index --find-links /opt/wheels"]),
        ("", "", "cu126", [f"{PIP} torch>=2.11,<2.14 --index-url {WHEELS}/cu126"]),  # what was chosen before stays
        ("cu130", "", "cu126", ["-m pip uninstall -y -q torch", f"{PIP} torch>=2.11,<2.14 --index-url {WHEELS}/cu130"]),
    ],
)
def test_setup_takes_torch_from_where_it_is_told(tmp_path, asked, driver, before, pip):
    """`make setup` with a Python that writes down what it is to do."""
    log, python = tmp_path / "log", tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\n[ "$2" != harness/devices.py ] || echo "{driver}"\n')
    python.chmod(0o755)
    if before:
        (tmp_path / ".torch-index").write_text(before + "\n")
    make = ["make", "setup", f"VENV={tmp_path}", f"TORCH_INDEX={asked}"]
    assert subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line for line in log.read_text().splitlines() if "pip" in line and "torch" in line] == pip
    log.unlink()
    again = subprocess.run([*make[:-1], f"TORCH_INDEX={asked}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not log.exists(), again.stdout  # the same index again: nothing to do


def test_setup_says_what_to_do_where_torch_is_not_to_be_had(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$3" != install ]\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"VENV={tmp_path}", "TORCH_INDEX=cu199"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("torch: 'cu199': not to be had from there; name a mirror: make setup TORCH_INDEX=URL")


def test_every_third_party_import_is_declared():
    names = {re.split(r"[^A-Za-z0-9.-]", requirement)[0] for requirement in declared()}
    providers = importlib.metadata.packages_distributions()
    undeclared = {}
    for path in python_files():
        for module in set(imported(path)) - OWN - BY_HAND - sys.stdlib_module_names:
            by = [DISTRIBUTION_OF[module]] if module in DISTRIBUTION_OF else providers.get(module, [module])
            local = (path.parent / f"{module}.py").exists() or (path.parent / module).is_dir()  # a test's neighbour
            if not local and not names & {canonical(name) for name in by}:
                undeclared.setdefault(module, str(path.relative_to(ROOT)))
    assert not undeclared, f"declare these in pyproject.toml and environment.yml: {undeclared}"


def test_a_wheel_holds_the_package_data(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "harness", "baselines", "methods"):
        (copy / name).symlink_to(ROOT / name)
    subprocess.run([*command, "-w", str(tmp_path), str(copy)], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("moebench-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "harness").rglob("*") if path.suffix in DATA}
    assert "harness/presets/models.yaml" in tracked
    assert tracked <= inside


DATA = {".yaml", ".j2", ".css", ".json", ".js"}
