"""Finds systems by listing ``baselines`` and ``methods``: a file there is the registration.

A file that is at fault costs what it would have brought, and nothing else: ``faults`` names it, and why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from harness.errors import OF_A_SYSTEM, UserError, bad, unknown, words
from harness.system import System

FOLDERS = ("baselines", "methods")
STATED = ("name", "title", "source", "kind")  # what a system says of itself
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_faults: dict[str, None] = {}  # as a set that keeps its order


def faults() -> list[str]:
    """A line for every file that was left out so far, or of which something was: the file, and why."""
    return list(_faults)


@functools.cache
def systems() -> dict[str, type[System]]:
    """Every concrete ``System`` class by name, sorted; baselines and methods alike."""
    found: dict[str, list[type[System]]] = {}
    for module in _modules():
        for member in vars(module).values():
            if inspect.isclass(member) and issubclass(member, System) and _whole(member, module):
                same = found.setdefault(member.name, [])
                if member not in same:
                    same.append(member)
    kept = {name: _one_of(name, same) for name, same in found.items()}
    return {name: member for name, member in sorted(kept.items()) if member is not None}


def system(name: str) -> type[System]:
    """The system called ``name``, or of the recipe of that name (``harness.recipes``); else an error with the nearest
    known names."""
    known = systems()
    if name not in known:
        from harness import recipes

        if "+" in name or "=" in name or name in recipes.gives():
            return recipes.system(name)
        error = unknown("system", name, known, "systems")
        raise UserError("; ".join([str(error), *(f"left out: {fault}" for fault in faults())]))
    return known[name]


def state(system: type[System]) -> tuple[str | None, str | None]:
    """Version, and what is missing; a system that cannot even tell is one that is missing something."""
    try:
        missing = system.missing()
        return None if missing else system.version(), missing
    except OF_A_SYSTEM as error:  # a half-installed package may raise anything
        return None, f"{type(error).__name__}: {words(error)}"


def brought(module: str, attribute: str, kind: type) -> dict[str, Any]:
    """What methods bring beside systems: mappings ``attribute`` of every ``<folder>/<module>.py`` from names to things
    of ``kind``, joined, sorted."""
    found: dict[str, Any] = {}
    for info in _listed():
        name = f"{info.name}.{module}"
        try:
            if not info.ispkg or importlib.util.find_spec(name) is None:
                continue
            own = dict(getattr(importlib.import_module(name), attribute))
        except OF_A_SYSTEM as error:  # a method's own affair
            _left_out(name, error)
            continue
        for key, each in own.items():
            if not (isinstance(key, str) and NAME.fullmatch(key) and isinstance(each, kind)):
                _left_out(
                    name,
                    f"{attribute}[{key!r}] must be a {kind.__name__} under a name of letters, digits, '.', '_', '-'",
                )
                continue
            if key in found:
                _left_out(name, bad(attribute.lower(), key, "there are two of this name; rename one"))
            found.setdefault(key, each)
    return dict(sorted(found.items()))


@functools.cache
def attributes(attribute: str, wrong: Callable[[str, Any], str] | None = None) -> dict[str, Any]:
    """Mappings ``attribute`` of all files and folders of systems, joined, sorted. ``wrong``: what is, of a name and
    what it stands for; empty: nothing."""
    found: dict[str, Any] = {}
    for module in _modules():
        try:
            own = dict(getattr(module, attribute, {}))
        except (TypeError, ValueError) as error:
            _left_out(module.__name__, f"{attribute}: {error}")
            continue
        for key, each in own.items():
            if said := wrong(key, each) if wrong is not None else "":
                _left_out(module.__name__, f"{attribute}[{key!r}] {said}")
                continue
            if key in found and found[key] is not each:
                _left_out(module.__name__, bad(attribute.lower(), key, "there are two of this name; rename one"))
            found.setdefault(key, each)
    return dict(sorted(found.items()))


# -------------------------------------------------------------------------------------------------- what is at fault


def _listed() -> Iterator[pkgutil.ModuleInfo]:
    for folder in FOLDERS:
        yield from pkgutil.iter_modules(importlib.import_module(folder).__path__, prefix=f"{folder}.")


def _modules() -> Iterator[ModuleType]:
    """Those that can be imported."""
    for info in _listed():
        try:
            yield importlib.import_module(info.name)
        except OF_A_SYSTEM as error:  # a system's own affair
            _left_out(info.name, error)


def _whole(member: type[System], module: ModuleType) -> bool:
    """Whether a class that stands in ``module`` is a system: one that says its name has all else that one needs. What
    says none is a base of others."""
    here = member.__module__ == module.__name__ or member.__module__.startswith(f"{module.__name__}.")
    if inspect.isabstract(member) and not (here and "name" in vars(member)):
        return False
    missing = [f"method {name}" for name in sorted(member.__abstractmethods__)]
    missing += [each for each in STATED if not isinstance(getattr(member, each, None), str)]
    if not missing and not NAME.fullmatch(member.name):
        missing = [f"name of letters, digits, '.', '_' and '-' (it is {member.name!r})"]
    if missing and here and not any(member is part for part in _parts(module)):
        _left_out(module.__name__, f"class {member.__name__} has no {', no '.join(missing)}")
    return not missing


def _parts(module: ModuleType) -> list[Any]:
    """Classes of recipes (``harness.recipes``), which need no name of their own."""
    brought = (getattr(module, attribute, {}) for attribute in ("STATES", "PLACINGS"))
    return [part for parts in brought if isinstance(parts, dict) for part in parts.values()]


def _one_of(name: str, same: list[type[System]]) -> type[System] | None:
    """Of classes of one name the one whose file the name begins with; none if that does not tell."""
    if len(same) == 1:
        return same[0]
    homes = [each for each in same if name.startswith(each.__module__.split(".")[1].replace("_", "-"))]
    kept = homes[0] if len(homes) == 1 else None
    for each in same:
        if each is not kept:
            others = ", ".join(f"{o.__name__} of {_file(o.__module__)}" for o in same if o is not each)
            _left_out(each.__module__, f"class {each.__name__} has the name {name!r} of {others}; rename one")
    return kept


def _left_out(module: str, why: object) -> None:
    reason = f"{type(why).__name__}: {words(why)}" if isinstance(why, BaseException) else str(why)
    _faults[f"{_file(module)}: {' '.join(reason.split())}"] = None


def _file(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, SyntaxError):
        spec = None
    return module if spec is None or spec.origin is None else spec.origin
