"""The results store: a folder of Parquet parts with one value a row, and JSON records beside them.

A part is written whole or not at all and never changed afterwards, so a run that is killed keeps every race that it
had finished, and several writers cannot harm each other. Raw samples are kept; nothing is aggregated here.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from harness import sealed
from harness.errors import UserError, bad
from harness.plan import perfetto
from harness.plan.graph import Timeline
from harness.specs import Experiment

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 2
_VERSION_KEY = b"moebench_schema_version"
_CELLS_KEY = b"moebench_cells"  # in a part's footer: what ``Store.outcomes`` tells, so that nobody need read the rows

#: One value a row. ``rep`` -1: not of one repetition; ``rank`` -1: of the whole job.
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("launch", pa.int32()),
        ("race", pa.string()),  # Experiment.race
        ("cell", pa.string()),  # Experiment.digest
        ("system", pa.string()),
        ("phase", pa.string()),
        ("model", pa.string()),
        ("cluster", pa.string()),
        ("workload", pa.string()),
        ("dtype", pa.string()),
        ("wire", pa.string()),
        ("evidence", pa.string()),  # emulated | measured | simulated | reported
        ("network", pa.string()),  # shaped | unshaped | physical | modelled
        ("compute", pa.string()),  # real | stand-in
        ("metric", pa.string()),
        ("direction", pa.string()),  # forward | backward | total | ""
        # a link level, expert | rank | node | link, a part of memory, what a row of metric "how" tells, what experts'
        # parameters were sent for (``harness.comm.moved``), or ""
        ("level", pa.string()),
        ("value", pa.float64()),
        ("unit", pa.string()),
        ("rep", pa.int32()),
        ("rank", pa.int32()),
        ("status", pa.string()),
        # why a status is not ok; of metric "how", in which way it ran; of "note", the text; of "step", which is stored
        # where routing drifts, the hash of that step's routing
        ("reason", pa.string()),
        ("time_utc", pa.string()),  # the same for all rows of one attempt at a race
        ("schema_version", pa.int32()),
        ("basis", pa.string()),  # of what is simulated: what its seconds rest on
        ("heldout_error", pa.float64()),  # mean |relative error| of that basis on cells that ran; null: not known
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
COLUMNS: tuple[str, ...] = tuple(SCHEMA.names)
LATER = ("basis", "heldout_error")  # null in parts of version 1, and in rows of what ran
BLANK: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), **dict.fromkeys(LATER)}
#: of one cell in one launch: when its latest rows were made, its status and why, and whether it need not run again
Told = tuple[str, str, str, bool]
SIMULATED = "simulated"  # the evidence of what never ran
STATUSES = ("ok", "refused", "failed", "hung", "oom", "nonconforming", "unphysical", "cpu_bound")


class Store:
    """Rows and records of one run, in the folder ``path`` (which a reader never creates or changes)."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    # ------------------------------------------------------------------ writing

    def prepare(self) -> None:
        """Make the folder and prove that it can be written, before any work starts; ``UserError`` if not."""
        with _clear_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{uuid.uuid4().hex}"
            try:
                with probe.open("wb") as file:
                    file.write(b"\0" * 65536)
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                probe.unlink(missing_ok=True)

    def refuse_other(self, *, simulated: bool) -> None:
        """``UserError`` if the folder holds what was executed and this is ``simulated``, or the other way round."""
        if (known := self.simulated()) is None or known == simulated:
            return
        told = "holds a simulation, and what runs" if known else "holds a run that was executed, and a simulation"
        raise bad("run", self.path.name, f"{told} needs a folder of its own; take another --name")

    def simulated(self) -> bool | None:
        """Whether what the folder holds was simulated; None if it holds nothing that tells."""
        if (self.path / "sweep").exists():
            return False
        for path in self.path.glob("rows-*.parquet"):
            with contextlib.suppress(Exception):  # a damaged file makes Parquet's reader raise many kinds
                if found := pq.read_table(path, columns=["evidence"])["evidence"].to_pylist():
                    return bool(found[0] == SIMULATED)
        for path in self.path.glob("record-*.json"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if found := json.loads(path.read_text(encoding="utf-8")).get("evidence"):
                    return bool(found == SIMULATED)
        return None

    def append(self, rows: pd.DataFrame) -> Path:
        """Store ``rows`` (the columns of ``SCHEMA``, ``LATER`` ones or not, all of one launch) as one new part."""
        rows = rows.assign(**{name: None for name in LATER if name not in rows})
        if set(rows.columns) != set(COLUMNS):
            raise ValueError(f"columns differ from the schema: {sorted(set(rows.columns) ^ set(COLUMNS))}")
        launches = rows["launch"].unique()
        if len(launches) != 1:
            raise ValueError(f"a part holds one launch, not {list(launches)}")
        if unknown := set(rows["status"]) - set(STATUSES):
            raise ValueError(f"unknown status {sorted(unknown)}; known are {', '.join(STATUSES)}")
        rows = rows.assign(time_utc=self._after_earlier(rows))
        table = pa.Table.from_pandas(rows[list(COLUMNS)], schema=SCHEMA, preserve_index=False)
        cells = sealed.seal({"cells": _told(rows)}, "cells").encode()
        table = table.replace_schema_metadata({**(SCHEMA.metadata or {}), _CELLS_KEY: cells})
        whole = io.BytesIO()
        pq.write_table(table, whole, write_page_checksum=True)
        data = whole.getvalue()
        races = rows["race"].unique()
        race = f"{races[0]}." if len(races) == 1 and re.fullmatch("[0-9a-f]{16}", races[0]) else ""
        name = f"rows-{launches[0]}-{race}{hashlib.sha256(data).hexdigest()}-{uuid.uuid4().hex[:12]}"
        path = self.path / f"{name}.parquet"
        self._write_whole(path, lambda file: file.write(data))
        return path

    def _after_earlier(self, rows: pd.DataFrame) -> pd.Series:
        """``time_utc`` of an attempt, later than that of any earlier attempt at its cells, whatever this machine's
        clock says."""
        own = rows["time_utc"]
        cells = set(zip(rows["cell"].astype(str), rows["launch"].astype(int), strict=True))
        races = set(rows["race"])
        parts = (name for name in os.listdir(self.path) if name.startswith("rows-"))  # noqa: PTH208 (of ten thousand)
        earlier = (self.path / name for name in parts if name.count(".") < 2 or any(race in name for race in races))
        known = [each[2] for path in earlier for each in _cells_of(path) if (each[0], each[1]) in cells]
        latest = max(known, default="")
        if own.empty or latest <= own.max():
            return own
        try:
            moment = datetime.datetime.fromisoformat(latest) + datetime.timedelta(microseconds=1)
        except ValueError:
            return own
        return own.map(lambda _: moment.isoformat(timespec="microseconds"))

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Store ``record`` as ``record-<name>.json``, replacing an older one of that name."""
        text = sealed.seal(record, "record", indent=1, sort_keys=True)
        self._write_whole(self.path / f"record-{name}.json", lambda file: file.write(text.encode()))

    def write_trace(self, cell: str, timelines: Mapping[str, Timeline]) -> None:
        """Store the timelines of a cell's last repetition as ``traces/<cell>.json`` for Perfetto, replacing an older
        launch's."""
        path = self.path / "traces" / f"{cell}.json"
        with _clear_errors(self.path):
            path.parent.mkdir(exist_ok=True)
        self._write_whole(path, lambda file: file.write(perfetto.text(timelines).encode()))

    def trace(self, cell: str) -> dict[str, Timeline]:
        """Executed timelines of a cell [num_tasks, ranks] by direction; none if there are none that can be read."""
        try:
            return perfetto.read(self.path / "traces" / f"{cell}.json")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"{_one_line(error)}; its timeline is not shown", stacklevel=2)
            return {}

    def _write_whole(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        """Write beside ``path``, make it durable, then rename: readers see the whole file or none."""
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        with _clear_errors(self.path):
            try:
                with partial.open("wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
            folder = os.open(self.path, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # not every file system syncs folders; the rename is done
                    os.fsync(folder)
            finally:
                os.close(folder)

    # ------------------------------------------------------------------ reading

    def read(self, damaged: Literal["warn", "raise", "skip"] = "warn") -> pd.DataFrame:
        """All rows; where a race ran again in the same launch, those of the latest attempt only.

        A part that cannot be read never hides the others: it is named in a warning, raised as ``UserError``, or
        skipped (``damaged()`` names it all the same). A part of a newer schema is always a ``UserError``.
        """
        tables, problems = self._load()
        for problem in problems:
            if damaged == "raise":
                raise UserError(problem)
            if damaged == "warn":
                warnings.warn(problem, stacklevel=2)
        rows = pa.concat_tables([SCHEMA.empty_table(), *tables]).to_pandas()
        latest = rows.groupby(["cell", "launch"])["time_utc"].transform("max")
        return rows[rows["time_utc"] == latest].reset_index(drop=True)

    def damaged(self) -> list[str]:
        """One line for every part that cannot be read, with its remedy."""
        return self._load()[1]

    def finished(self) -> set[tuple[str, int]]:
        """(cell, launch) pairs that need not run again: timed, or refused. What failed, hung or did not conform
        runs again, and so does what a damaged part held."""
        rows = self.read(damaged="skip")
        done = rows[(rows["metric"] == "time_s") | (rows["status"] == "refused")]
        return {(str(cell), int(launch)) for cell, launch in zip(done["cell"], done["launch"], strict=True)}

    def outcomes(self) -> dict[tuple[str, int], Told]:
        """What became of every (cell, launch) that has rows, in its latest attempt; from the parts' footers alone, so
        a damaged part may still be told here, while ``read`` leaves it out."""
        found: dict[tuple[str, int], Told] = {}
        for path in self.path.glob("rows-*.parquet"):
            for cell, launch, *told in _cells_of(path):
                if (cell, launch) not in found or found[cell, launch][0] < told[0]:
                    found[cell, launch] = tuple(told)
        return found

    def told_finished(self) -> set[tuple[str, int]]:
        """``finished`` as ``outcomes`` tells it: fast over many parts, and blind to damage inside of one."""
        return {pair for pair, told in self.outcomes().items() if told[-1]}

    def records(self) -> dict[str, dict[str, Any]]:
        """Every record by name; one that cannot be read is left out with a warning."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.path.glob("record-*.json")):
            try:
                found[path.stem.removeprefix("record-")] = sealed.unseal(path.read_text(encoding="utf-8"), "record")
            except (OSError, ValueError) as error:
                warnings.warn(f"{path}: cannot be read ({_one_line(error)}); its launch has no record", stacklevel=2)
        return found

    def _load(self) -> tuple[list[pa.Table], list[str]]:
        tables, problems = [], []
        for path in sorted(self.path.glob("rows-*.parquet")):
            try:
                data = path.read_bytes()
                # the version is judged before any column is decoded
                with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as part:
                    _check_version(path, part.schema_arrow)
                    table = _with_later(part.read()).cast(SCHEMA)
                checksum = _named(path)[1]
                if checksum and checksum != hashlib.sha256(data).hexdigest():
                    raise ValueError("its contents are not those of its name")
                tables.append(table)
            except UserError:
                raise
            except Exception as error:  # a damaged file makes Parquet's reader raise many kinds
                remedy = "delete it; `moebench run` then runs its cells again"
                problems.append(f"{path}: damaged or not a moebench part ({_one_line(error)}): {remedy}")
        return tables, problems


def identity(experiment: Experiment) -> dict[str, Any]:
    """Columns of the store that an experiment decides, but its cell's."""
    return {
        "race": experiment.race,
        "system": experiment.system,
        "phase": experiment.phase,
        "model": experiment.model.name + (" (model-parallel)" if experiment.model_parallel else ""),
        "cluster": experiment.cluster.name,
        "workload": experiment.workload.name,
        "dtype": experiment.formats,
        "wire": experiment.wire,
        "compute": experiment.compute,
    }


def _with_later(table: pa.Table) -> pa.Table:
    """``table`` with the columns that came later, null where it has none."""
    for name in LATER:
        if name not in table.column_names:
            table = table.append_column(SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))
    return table


def _told(rows: pd.DataFrame) -> list[list[Any]]:
    """[cell, launch, *``Told``] of every cell in ``rows``."""
    decisive = rows[rows["metric"].isin(["time_s", "status"])].groupby(["cell", "launch"]).first()
    return [
        [str(cell), int(launch), row["time_utc"], row["status"], row["reason"][:500], bool(done)]
        for (cell, launch), row, done in zip(
            decisive.index,
            decisive.to_dict("records"),
            (decisive["metric"] == "time_s") | (decisive["status"] == "refused"),
            strict=True,
        )
    ]


def _named(path: Path) -> tuple[str, str]:
    """Race and checksum of a part, as its name says; "" where an older moebench named it."""
    found = re.fullmatch(r"rows-\d+-(?:([0-9a-f]{16})\.)?([0-9a-f]{64})-[0-9a-f]{12}", path.stem)
    return (found[1] or "", found[2]) if found else ("", "")


def _cells_of(path: Path) -> list[list[Any]]:
    """[cell, launch, *``Told``] of a part by its footer; none where that cannot be read."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        if _CELLS_KEY not in metadata:
            return _told_of(path)
        told = json.loads(metadata[_CELLS_KEY])
        cells = told if isinstance(told, list) else sealed.unseal(metadata[_CELLS_KEY].decode(), "cells")["cells"]
        return [each for each in cells if len(each) == 6 and isinstance(each[2], str)]
    except Exception:  # a damaged file makes Parquet's reader raise many kinds
        return []


def _told_of(path: Path) -> list[list[Any]]:
    """Of a part whose footer does not tell."""
    columns = ["cell", "launch", "metric", "time_utc", "status", "reason"]
    return _told(pq.read_table(path, columns=columns).to_pandas())


def _check_version(path: Path, schema: pa.Schema) -> None:
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is None:
        raise ValueError("it states no schema version")
    if int(version) > SCHEMA_VERSION:
        raise bad(
            str(path),
            f"schema version {int(version)}",
            f"this moebench reads up to version {SCHEMA_VERSION}; upgrade moebench",
        )


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "choose a folder that you may write, with free space (option --results)"
        raise UserError(f"results folder {path}: {reason}: {remedy}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
