"""``moebench check``: conformance of systems on the ranks of one cluster, one session for all of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from harness import presets
from harness.errors import STATUS_OF_FAILURE, RankFailure, bad
from harness.launch import scratch
from harness.launch.session import Session, open_session
from harness.specs import DTYPE_BYTES, Cluster, with_levels
from harness.topology import check_size

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
    """Rows of ``harness.bench.conformance.check`` for every system. Where a system ends its ranks or hangs, the trial
    in which it did is a row with status ``failed``, ``oom`` or ``hung``, and its trials after that are not run; the
    next system gets new ranks. The logs stay where anything has failed."""
    check_size(cluster.name, cluster.shape)
    rows: list[dict[str, Any]] = []
    with scratch.logs("check") as logs, contextlib.ExitStack() as stack:
        session: Session | None = None
        for number, system in enumerate(systems):
            if session is None:
                say(f"starting the ranks of {cluster.name}")
                log_dir = logs.path / str(number)
                session = stack.enter_context(open_session(cluster, log_dir=log_dir, preload=PRELOAD))
            say(f"checking {system} on {cluster.num_ranks} ranks")
            done: list[dict[str, Any]] = []
            try:
                of_ranks = session.call(
                    "harness.bench.conformance:check",
                    {"systems": [system], **payload},
                    timeout_s=TIMEOUT_S,
                    on_progress=lambda message: done.append(message["row"]),  # noqa: B023  # called in this turn only
                )
            except RankFailure as failure:
                session = None
                rows += [*done, _ended(system, failure)]
            else:
                rows += of_ranks[0]
        if any(row["status"] not in ("ok", "refused", "nonconforming") for row in rows):
            logs.keep()
            say(f"logs of the ranks: {logs.path}")
    return [{**row, "ranks": cluster.num_ranks, "cluster": cluster.name} for row in rows]


def _ended(system: str, failure: RankFailure) -> dict[str, Any]:
    """The row of the trial in which the ranks of ``system`` ended."""
    _, _, trial = failure.phase.partition(f"check {system} ")
    for dtype in DTYPE_BYTES:
        trial = trial.removesuffix(f" {dtype}")
    _, _, dtype = failure.phase.partition(f"check {system} {trial} ") if trial else ("", "", "")
    reason = f"rank {failure.rank} {failure.kind.replace('_', ' ')} in {failure.phase!r}: {failure.message}"
    reason += f" (log: {failure.log_path}); its trials after that were not run"
    facts: dict[str, Any] = {
        "status": STATUS_OF_FAILURE[failure.kind],
        "reason": reason,
        "errors": {},
        "tolerance": None,
    }
    return {"system": system, "trial": trial, "dtype": dtype, **facts}


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
    """What was not ok: one row for each system, status and kind of reason, with the trials and dtypes that it befell,
    and of the reasons the worst, or the first."""
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] != "ok":
            table.setdefault((row["system"], row["status"], _kind(row)), []).append(row)
    found = []
    for (system, status, _), same in table.items():
        worst = max(same, key=_times_allowed)
        where = f"worst in {worst['trial']} {worst['dtype']}: " if len({row["reason"] for row in same}) > 1 else ""
        found.append(
            {
                "system": system,
                "status": status,
                "num_rows": len(same),
                "trials": _some(dict.fromkeys(row["trial"] for row in same)),
                "dtypes": ", ".join(dict.fromkeys(row["dtype"] for row in same)),
                "reason": where + worst["reason"],
            }
        )
    return found


def _kind(row: dict[str, Any]) -> str:
    """The reason without what differs from trial to trial: of an error its tensors, of words the numbers and names."""
    if row["errors"]:
        return ", ".join(name for name, error in row["errors"].items() if not error <= row["tolerance"])
    return re.sub(r"'check [^']*'|\d+", "", row["reason"])


def _times_allowed(row: dict[str, Any]) -> float:
    return max(row["errors"].values()) / row["tolerance"] if row["errors"] and row["tolerance"] else 0.0


def _some(names: Iterable[str], at_most: int = 6) -> str:
    names = list(names)
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")
