"""Fixtures of the report's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.specs import Experiment
from tests.report.synthetic_run import RunMaker, experiment, fill


@pytest.fixture
def maker(tmp_path: Path) -> RunMaker:
    """An empty synthetic run."""
    return RunMaker(tmp_path / "runs" / "demo")


@pytest.fixture
def make_experiment() -> Callable[..., Experiment]:
    return experiment


@pytest.fixture
def full(maker: RunMaker) -> RunMaker:
    """A synthetic run with everything in it."""
    fill(maker)
    return maker
