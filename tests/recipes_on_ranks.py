"""What every rank does in the tests of recipes."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import methods
from harness import recipes, registry
from harness.bench import conformance
from harness.comm.job import Job


@contextlib.contextmanager
def dropped(folder: str | None) -> Iterator[None]:
    """With the files of ``folder`` among those of ``methods``."""
    if folder is None:
        yield
        return
    before, modules = list(methods.__path__), set(sys.modules)
    methods.__path__.append(folder)
    try:
        forget()
        yield
    finally:
        methods.__path__[:] = before
        for name in set(sys.modules) - modules:
            if name.startswith("methods."):
                del sys.modules[name]
                with contextlib.suppress(AttributeError):
                    delattr(methods, name.removeprefix("methods."))
        forget()


def forget() -> None:
    importlib.invalidate_caches()
    of_recipes = (recipes.known, recipes.gives, recipes._named, recipes._composed)
    for cached in (registry.systems, registry.attributes, *of_recipes):
        cached.cache_clear()


def conform(job: Job, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every recipe (``payload["trials"]``: name, dtypes, options): rows of the check; ``num_steps``: of a training
    instead. ``folder``: of files beside those that are there."""
    rows: list[dict[str, Any]] = []
    with dropped(payload.get("folder")):
        for name, dtypes, options in payload["trials"]:
            if payload.get("num_steps"):
                found = conformance.check_training(job, name, options, payload["num_steps"])
                rows.append({"system": name, "dtype": "float64", **found})
                continue
            for dtype in dtypes:
                found = conformance.check_one(job, name, payload["trial"], dtype, options)
                rows.append({"system": name, "dtype": dtype, **found})
    return rows


__all__ = ["conform", "dropped"]
