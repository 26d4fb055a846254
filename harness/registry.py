"""Finds systems by listing ``baselines`` and ``methods``: a file there is the registration."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
from typing import Any

from harness.errors import unknown
from harness.system import System

FOLDERS = ("baselines", "methods")


@functools.cache
def systems() -> dict[str, type[System]]:
    """Every concrete ``System`` class by name, sorted; baselines and methods alike."""
    found: dict[str, type[System]] = {}
    for folder in FOLDERS:
        package = importlib.import_module(folder)
        for info in pkgutil.iter_modules(package.__path__, prefix=f"{folder}."):
            module = importlib.import_module(info.name)
            for member in vars(module).values():
                if inspect.isclass(member) and issubclass(member, System) and not inspect.isabstract(member):
                    other = found.setdefault(member.name, member)
                    if other is not member:
                        raise RuntimeError(f"two systems are named {member.name}: {other} and {member}")
    return dict(sorted(found.items()))


def system(name: str) -> type[System]:
    """The system called ``name``, or an error with the nearest known names."""
    known = systems()
    if name not in known:
        raise unknown("system", name, known, "systems")
    return known[name]


def brought(module: str, attribute: str) -> dict[str, Any]:
    """What methods bring beside systems: mappings ``attribute`` of every ``<folder>/<module>.py``, joined, sorted."""
    found: dict[str, Any] = {}
    for folder in FOLDERS:
        for info in pkgutil.iter_modules(importlib.import_module(folder).__path__, prefix=f"{folder}."):
            if info.ispkg and importlib.util.find_spec(f"{info.name}.{module}"):
                for name, each in getattr(importlib.import_module(f"{info.name}.{module}"), attribute).items():
                    if name in found:
                        raise RuntimeError(f"two {attribute.lower()} are named {name}: one of them in {info.name}")
                    found[name] = each
    return dict(sorted(found.items()))
