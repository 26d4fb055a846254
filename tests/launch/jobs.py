"""What the jobs do in the tests of allocations; without torch, whose import would last longer than they do."""

from __future__ import annotations

import os

from harness.launch.allocation import report
from harness.launch.session import open_session


def in_allocation(cluster, log_dir):
    report({"done": 0})
    with open_session(cluster, log_dir=log_dir) as ranks:
        totals = ranks.call("tests.launch.work:total")
    report({"done": 1})
    return totals


def environment(name):
    return os.environ.get(name)


def hang_in_allocation(cluster, log_dir):
    with open_session(cluster, log_dir=log_dir) as ranks:
        report({"ready": True})
        ranks.call("tests.launch.work:go_wrong", {"rank": 1, "how": "hang"})


def fail_with(error):
    raise error
