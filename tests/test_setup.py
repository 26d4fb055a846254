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

import yaml

ROOT = Path(__file__).resolve().parents[1]
OWN = {"harness", "baselines", "methods", "tests"}
# Importable by another name than the distribution's, where that is not installed here to be asked.
DISTRIBUTION_OF = {"yaml": "pyyaml", "megatron": "megatron-core", "deepspeed": "deepspeed"}
BY_HAND = {"tutel"}  # on no package index; environment.yml and moebench doctor name its repository


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


def test_torch_is_pinned_the_same_everywhere():
    (torch,) = [line for line in project()["dependencies"] if line.startswith("torch")]
    assert torch == "torch==2.13.0"
    assert torch in (ROOT / "Makefile").read_text()


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
