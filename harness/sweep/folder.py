"""A sweep on disk, in the folder of the run that it fills: what was asked for, the jobs, and what happens to them.

    results/runs/NAME/              the store, as of any run: rows, records, traces, logs of ranks
    results/runs/NAME/sweep/
      sweep.json                    the file, where it runs, its cells
      jobs/00007.json               a job: cluster, wire, and its (launch, race) tasks
      tasks.jsonl                   which job has which race of which launch
      events/00007.jsonl            what the job says: start, begin, race, stop, killed, end
      events/00007/3.jsonl          what its ranks say of themselves: failed
      submissions.jsonl             which job has which number in Slurm; one line a submission
      tree/                         the code as it was
      submitit/                     scripts, pickles and logs of the jobs; N_ends: how their tasks ended, by the script
      calibration.json              of a profile: what was added to the ledger
      cancelled                     while it exists, nothing is requeued

Nothing here needs torch, so that ``moebench status`` answers at once.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import sealed
from harness.errors import bad

Task = tuple[str, int]  # race digest, launch
_ANEW = "submit the sweep again by another name"


class SweepFolder:
    """Paths and files of one sweep."""

    def __init__(self, run_dir: Path | str):
        self.run_dir = Path(run_dir).resolve()
        self.path = self.run_dir / "sweep"

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def tree(self) -> Path:
        return self.path / "tree"

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def cancelled(self) -> Path:
        return self.path / "cancelled"

    def require(self) -> SweepFolder:
        """Itself; ``UserError`` if there is no sweep."""
        if not (self.path / "sweep.json").exists():
            known = sorted(path.parents[1].name for path in self.run_dir.parent.glob("*/sweep/sweep.json"))
            raise bad("sweep", str(self.run_dir), f"there is none; known sweeps are {', '.join(known) or 'none yet'}")
        return self

    def read(self, name: str = "sweep.json") -> dict[str, Any]:
        """What ``write`` wrote; ``UserError`` names a file that is damaged or not there."""
        path = self.path / name
        try:
            return sealed.unseal(path.read_text(encoding="utf-8"), f"sweep/{path.parent.name}")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise bad("sweep", str(path), f"cannot be read ({reason}); {_ANEW}") from None

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``value`` to ``name`` whole or not at all."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_text(sealed.seal(value, f"sweep/{path.parent.name}"))
        partial.replace(path)

    def job(self, index: int) -> dict[str, Any]:
        return self.read(f"jobs/{index:05}.json")

    def add_job(self, job: dict[str, Any]) -> int:
        """Write down what a job is to do: cluster, wire, across, tasks [launch, race]; returns its index."""
        index = len(self.tasks())
        self.write(f"jobs/{index:05}.json", job)
        tasks = [[launch, race["digest"]] for launch, race in job["tasks"]]
        _append(self.path / "tasks.jsonl", {"job": index, "tasks": tasks})
        return index

    def tasks(self) -> list[list[Task]]:
        """(race, launch) pairs of every job, by its index."""
        path = self.path / "tasks.jsonl"
        found: list[list[Task]] = []
        for line in _lines(path, "tasks", whole=True):
            if line.get("job") != len(found):
                raise bad("sweep", str(path), f"does not go on with job {len(found)}; {_ANEW}")
            found.append([(race, launch) for launch, race in line["tasks"]])
        return found

    def events_path(self, index: int) -> Path:
        return self.path / "events" / f"{index:05}.jsonl"

    def events(self, index: int) -> list[dict[str, Any]]:
        """What job ``index`` has said; a line that is being written is not there yet."""
        path = self.events_path(index)
        found = list(_lines(path, "did"))
        if (others := path.with_suffix("")).is_dir():
            found += (event for each in sorted(others.iterdir()) for event in _lines(each, "did"))
        return found

    def tell(self, index: int, did: str, *, rank: int = 0, **facts: Any) -> None:
        """Add to what job ``index`` has said; every rank has a file of its own, as nodes must not share one."""
        path = self.events_path(index)
        path = path.with_suffix("") / f"{rank}.jsonl" if rank else path
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, {"did": did, "at": time.time(), "rank": rank, **facts})

    def ends(self, number: str) -> list[dict[str, Any]]:
        """How the tasks of Slurm's job ``number`` ended so far, as its script noted it (``harness.sweep.script``)."""
        try:
            lines = (self.submitit / f"{number}_ends").read_text(errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return []
        parts = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
        return [{"at": float(at), "did": did, "why": why} for at, did, why in parts]

    def submissions(self) -> list[dict[str, Any]]:
        return list(_lines(self.path / "submissions.jsonl", "ids", whole=True))

    def add_submission(self, on: str, ids: dict[int, str], **facts: Any) -> None:
        """``ids``: job -> its number in Slurm, or the driver's process where jobs run on this machine."""
        ids_ = {str(index): number for index, number in ids.items()}
        _append(self.path / "submissions.jsonl", {"at": time.time(), "on": on, "ids": ids_, **facts})


def _append(path: Path, line: dict[str, Any]) -> None:
    """One write, so that lines of several processes do not mix."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(fd, sealed.line(line).encode())
    finally:
        os.close(fd)


def _lines(path: Path, key: str, whole: bool = False) -> Iterator[dict[str, Any]]:
    """Lines that have ``key``. ``whole``: each counts, so that a damaged one is a ``UserError``; else it is left out,
    as is a torn line of a machine that went down."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            if key not in (found := sealed.unline(line)):
                raise ValueError(f"has no {key}")
            yield found
        except ValueError as error:
            if whole:
                raise bad("sweep", f"{path}:{number}", f"cannot be read ({error}); {_ANEW}") from None


def attempts(events: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Events by attempt of the job: what rank 0 says, in its order, and what ranks say of an attempt by its number.

    No times are compared, as nodes may disagree about the time.
    """
    found: list[list[dict[str, Any]]] = [[]]
    for event in events:
        if "attempt" not in event:
            if event["did"] == "start":
                found.append([])
            found[-1].append(event)
    for event in events:
        if "attempt" in event and event["attempt"] < len(found):
            found[event["attempt"]].append(event)
    return found


def deaths(events: Sequence[dict[str, Any]]) -> dict[Task, list[str]]:
    """Of each race in which earlier attempts of the job died without a word: how each ended, as far as known."""
    found: dict[Task, list[str]] = {}
    for attempt in attempts(events)[:-1]:
        open_race: Task | None = None
        for event in attempt:
            match event["did"]:
                case "begin":
                    open_race = (event["race"], event["launch"])
                case "race" | "stop" | "end":
                    open_race = None
        killed = [event["why"] for event in attempt if event["did"] == "killed"]
        failed = any(event["did"] == "failed" for event in attempt)
        if open_race and (killed or not failed):  # of a rank that was killed, the others fail too
            found.setdefault(open_race, []).append(killed[-1] if killed else "")
    return found
