"""Running ranks for the tests, started once for all that ask for them, and the order in which tests run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness.launch.session import Session
from harness.specs import Cluster
from tests import ranks, side_by_side


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    side_by_side.group(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> side_by_side.TimedFirst | None:
    return side_by_side.TimedFirst(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Cluster | str], Session]]:
    """``session(cluster or preset name)`` gives its open session; see ``ranks.Sessions``."""
    with contextlib.closing(ranks.Sessions(tmp_path_factory)) as sessions:
        yield sessions.get
