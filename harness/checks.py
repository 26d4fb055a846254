"""``moebench check``: conformance of systems on the ranks of one cluster, one session for all of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness import presets
from harness.errors import bad
from harness.launch.session import RankFailure, Session, open_session
from harness.specs import Cluster, with_levels

TIMEOUT_S = 300.0
PRELOAD = ("harness.bench.conformance", "harness.compiled")  # the latter imports numba


def local_cluster(num_ranks: int) -> Cluster:
    """``num_ranks`` ranks of this machine, two nodes where they divide; the preset if there is one."""
    if num_ranks < 1:
        raise bad("--ranks", num_ranks, "must be at least 1")
    name = f"local-{num_ranks}"
    if name in presets.names("clusters"):
        return presets.cluster(name)
    nodes = 2 if num_ranks % 2 == 0 else 1
    return with_levels(
        name, [{"name": "node", "size": nodes}, {"name": "rank", "size": num_ranks // nodes}], kind="local"
    )


def check_systems(
    systems: Iterable[str], cluster: Cluster, payload: dict[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of ``harness.bench.conformance.check`` for every system. A system that kills its ranks or hangs is one
    row with status ``failed`` or ``hung``; the next one gets new ranks."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        session: Session | None = None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moebench-check-")))
        for number, system in enumerate(systems):
            if session is None:
                say(f"starting the ranks of {cluster.name}")
                session = stack.enter_context(open_session(cluster, log_dir=folder / str(number), preload=PRELOAD))
            say(f"checking {system} on {cluster.num_ranks} ranks")
            try:
                of_ranks = session.call(
                    "harness.bench.conformance:check", {"systems": [system], **payload}, timeout_s=TIMEOUT_S
                )
            except RankFailure as failure:
                session = None
                status = "hung" if failure.kind == "hung" else "failed"
                reason = f"rank {failure.rank} {failure.kind} in phase {failure.phase!r}: {failure.message}"
                rows.append(_row(system, status, reason))
            else:
                rows += of_ranks[0]
    return [{**row, "ranks": cluster.num_ranks, "cluster": cluster.name} for row in rows]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each system and dtype: how many trials ended how, the worst errors and what is allowed."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = table.setdefault(
            (row["system"], row["dtype"]),
            {"system": row["system"], "dtype": row["dtype"], "ok": 0, "refused": 0, "wrong": 0}
            | dict.fromkeys(("output", "input_grad", "weight_grad", "loss", "allowed")),
        )
        line[row["status"] if row["status"] in ("ok", "refused") else "wrong"] += 1
        for name, error in row["errors"].items():
            line[name] = max(line[name] or 0.0, error)
        line["allowed"] = row["tolerance"] if row["tolerance"] is not None else line["allowed"]
    return list(table.values())


def setbacks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was not ok: one row for each system, status and reason, with the trials and dtypes that it befell."""
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] != "ok":
            table.setdefault((row["system"], row["status"], row["reason"]), []).append(row)
    return [
        {
            "system": system,
            "status": status,
            "trials": ", ".join(dict.fromkeys(row["trial"] for row in same)),
            "dtypes": ", ".join(dict.fromkeys(row["dtype"] for row in same)),
            "reason": reason,
        }
        for (system, status, reason), same in table.items()
    ]


def _row(system: str, status: str, reason: str) -> dict[str, Any]:
    return {
        **{"system": system, "trial": "", "dtype": "", "status": status},
        **{"reason": reason, "errors": {}, "tolerance": None},
    }
