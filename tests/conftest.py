"""Running ranks for the tests: each cluster's are started once and serve every test that asks for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from harness import presets
from harness.launch.session import Session, open_session
from harness.specs import Cluster

#: what the tests state holds for ranks on the CPU, so that they pass on a machine with GPUs too; MOEBENCH_TEST_GPUS=1
#: leaves those in sight
if not os.environ.get("MOEBENCH_TEST_GPUS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Cluster | str], Session]]:
    """A factory: ``session(cluster or preset name)`` gives its open session; started anew if a rank had failed."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Session] = {}

        def get(cluster: Cluster | str) -> Session:
            cluster = presets.cluster(cluster) if isinstance(cluster, str) else cluster
            known = started.get(cluster.digest)
            if known is None or known.closed:
                log_dir = tmp_path_factory.mktemp(f"session-{cluster.name}")
                started[cluster.digest] = stack.enter_context(open_session(cluster, log_dir=log_dir))
            return started[cluster.digest]

        yield get
