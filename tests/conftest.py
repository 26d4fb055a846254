"""Running ranks for the tests, started once for all that ask for them, and the order in which tests run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from harness.launch.session import Session
from tests import ranks
from tests.side_by_side import (  # noqa: F401
    pytest_collection_finish,
    pytest_configure_node,
    pytest_xdist_make_scheduler,
)


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Session]]:
    """``session(cluster or preset name)`` gives its open session; see ``ranks.Sessions``."""
    with contextlib.closing(ranks.Sessions(tmp_path_factory)) as sessions:
        yield sessions.get
