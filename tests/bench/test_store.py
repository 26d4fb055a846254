from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.bench.store import COLUMNS, LATER, SCHEMA, SCHEMA_VERSION, Store
from harness.errors import UserError


def rows(cell: str = "c0", launch: int = 0, status: str = "ok", metric: str = "time_s", time: str = "t0", num: int = 3):
    text = {f.name: "" for f in SCHEMA if f.type == pa.string()}
    base = {**text, "cell": cell, "launch": launch, "status": status, "metric": metric, "time_utc": time}
    return pd.DataFrame(
        [{**base, "value": float(i), "rep": i, "rank": -1, "schema_version": SCHEMA_VERSION} for i in range(num)]
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "run")
    store.prepare()
    return store


def test_rows_come_back_as_they_went_in(store: Store) -> None:
    store.append(rows("a"))
    store.append(rows("b", launch=1))
    back = store.read()
    assert tuple(back.columns) == COLUMNS
    assert len(back) == 6
    assert back["value"].dtype == "float64"
    assert back["rep"].dtype == "int32"
    assert store.finished() == {("a", 0), ("b", 1)}


def test_an_empty_or_absent_folder_reads_as_no_rows(tmp_path: Path) -> None:
    back = Store(tmp_path / "absent").read()
    assert back.empty
    assert tuple(back.columns) == COLUMNS
    assert not (tmp_path / "absent").exists()


def test_a_later_attempt_supersedes_an_earlier_one(store: Store) -> None:
    store.append(rows("a", status="failed", metric="status", time="2026-01-01T00:00:00", num=1))
    assert store.finished() == set()
    store.append(rows("a", time="2026-01-02T00:00:00"))
    assert set(store.read()["status"]) == {"ok"}
    assert store.finished() == {("a", 0)}


def test_refused_is_final_and_nonconforming_is_not(store: Store) -> None:
    store.append(rows("a", status="refused", metric="status", num=1))
    store.append(rows("b", status="nonconforming", metric="status", num=1))
    assert store.finished() == {("a", 0)}


@pytest.mark.parametrize("how", ["truncated", "flipped", "foreign"])
def test_a_damaged_part_is_named_and_hides_nothing(store: Store, how: str) -> None:
    store.append(rows("good"))
    part = store.append(rows("lost", num=500))
    data = bytearray(part.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data) // 8] ^= 0xFF
    else:
        pq.write_table(pa.table({"x": [1]}), part)
        data = bytearray(part.read_bytes())
    part.write_bytes(data)
    with pytest.warns(UserWarning, match=part.name):
        assert set(store.read()["cell"]) == {"good"}
    with pytest.raises(UserError, match="delete it"):
        store.read(damaged="raise")
    assert part.name in store.damaged()[0]
    assert store.finished() == {("good", 0)}


def test_a_newer_schema_asks_for_an_upgrade(store: Store) -> None:
    newer = SCHEMA.with_metadata({b"moebench_schema_version": str(SCHEMA_VERSION + 1).encode()})
    pq.write_table(newer.empty_table(), store.path / "rows-0-abc.parquet")
    with pytest.raises(UserError, match="upgrade moebench"):
        store.read()


def test_wrong_columns_and_mixed_launches_are_rejected(store: Store) -> None:
    with pytest.raises(ValueError, match="unit"):
        store.append(rows().drop(columns="unit"))
    with pytest.raises(ValueError, match="one launch"):
        store.append(pd.concat([rows(launch=0), rows(launch=1)]))
    with pytest.raises(ValueError, match="status"):
        store.append(rows(status="fine"))
    assert store.read().empty


def test_a_killed_writer_leaves_whole_parts_only(tmp_path: Path) -> None:
    """A process that appends for ever is killed in the middle; every part that it left can be read whole."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]);"
        "from harness.bench.store import Store; from tests.bench.test_store import rows\n"
        "store = Store(sys.argv[1]); store.prepare(); print('ready', flush=True)\n"
        "while True: store.append(rows(num=2000))"
    )
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), root], stdout=subprocess.PIPE, cwd=root)
    assert child.stdout is not None
    child.stdout.readline()
    while len(list(tmp_path.glob("rows-*.parquet"))) < 3:
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    store = Store(tmp_path)
    assert store.damaged() == []
    assert len(store.read("raise")) == 2000 * len(list(tmp_path.glob("rows-*.parquet")))
    (tmp_path / ".rows-0-x.parquet.1.partial").write_bytes(b"PAR1 half")
    assert store.damaged() == []


def test_records(store: Store) -> None:
    store.write_record("launch-0", {"host": "h", "path": Path("x")})
    (store.path / "record-launch-1.json").write_text("{")
    with pytest.warns(UserWarning, match="record-launch-1"):
        assert store.records() == {"launch-0": {"host": "h", "path": "x"}}


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"results folder .*file.*choose a folder"):
        Store(tmp_path / "file" / "run").prepare()
    with pytest.raises(UserError, match="results folder"):
        Store("/proc/moebench").prepare()


def test_no_space_at_write_time_keeps_what_was_there(store: Store) -> None:
    store.append(rows("a"))
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import resource\n"
        "from harness.bench.store import Store; from harness.errors import UserError\n"
        "from tests.bench.test_store import rows\n"
        "store = Store(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: store.append(rows('b', num=5000))\n"
        "except UserError as error: print(error)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.path), root], capture_output=True, text=True, cwd=root, check=False
    )
    assert "results folder" in done.stdout, done.stderr
    assert set(store.read("raise")["cell"]) == {"a"}
    assert [p.name for p in store.path.iterdir() if p.name.startswith(".")] == []


def test_a_later_attempt_stands_though_its_clock_is_behind(store: Store) -> None:
    late, early = "2026-01-02T00:00:00.000000+00:00", "2026-01-01T00:00:00.000000+00:00"
    store.append(rows("a", status="failed", metric="status", time=late, num=1))
    store.append(rows("a", time=early))
    assert set(store.read()["status"]) == {"ok"}
    assert store.finished() == store.told_finished() == {("a", 0)}
    store.append(rows("a", status="hung", metric="status", time=early, num=1))
    assert set(store.read()["status"]) == {"hung"}
    store.append(rows("b", time=early))  # of other cells and launches nothing follows
    store.append(rows("a", launch=1, time=early))
    back = store.read()
    assert set(back[(back["cell"] == "b") | (back["launch"] == 1)]["time_utc"]) == {early}


def test_a_part_that_was_changed_is_damaged_though_parquet_reads_it(store: Store) -> None:
    part = store.append(rows("a"))
    pq.write_table(pq.read_table(part), part, compression="none")
    with pytest.raises(UserError, match="its contents are not those of its name"):
        store.read(damaged="raise")


def test_a_part_of_the_first_schema_is_read_beside_newer_ones(store: Store) -> None:
    """It has neither basis nor held-out error; whoever wrote it would be told to upgrade before reading a newer one."""
    old = pa.schema([field for field in SCHEMA if field.name not in LATER], {b"moebench_schema_version": b"1"})
    first = rows("old").drop(columns=[name for name in LATER if name in rows("old")])
    table = pa.Table.from_pandas(first[old.names], schema=old, preserve_index=False)
    pq.write_table(table, store.path / "rows-0-abc.parquet")
    store.append(rows("new").assign(basis="profile of x", heldout_error=0.03))
    store.append(rows("plain").drop(columns="basis"))
    back = store.read(damaged="raise").groupby("cell").first()
    assert list(back.loc[["new", "old"], "value"]) == [0, 0]
    assert back.loc["new", "basis"] == "profile of x"
    assert back["basis"].isna().sum() == 2
    assert back.loc["new", "heldout_error"] == 0.03
    assert back["heldout_error"].isna().sum() == 2
    assert store.finished() == {("old", 0), ("new", 0), ("plain", 0)}


@pytest.mark.parametrize("simulated", [False, True])
def test_what_ran_and_what_was_simulated_do_not_share_a_folder(store: Store, simulated: bool) -> None:
    evidence = "simulated" if simulated else "emulated"
    store.refuse_other(simulated=simulated)  # an empty one is anybody's
    store.write_record("launch-0", {"evidence": evidence})
    with pytest.raises(UserError, match=r"run: 'run': holds .* take another --name"):
        store.refuse_other(simulated=not simulated)
    (store.path / "record-launch-0.json").unlink()
    store.refuse_other(simulated=not simulated)
    (store.path / "rows-0-damaged.parquet").write_bytes(b"PAR1")
    store.append(rows().assign(evidence=evidence))
    store.refuse_other(simulated=simulated)
    with pytest.raises(UserError, match=r"run: 'run': holds .* take another --name"):
        store.refuse_other(simulated=not simulated)


def test_a_sweep_is_no_simulation_before_its_first_row(store: Store) -> None:
    (store.path / "sweep").mkdir()
    with pytest.raises(UserError, match="holds a run that was executed"):
        store.refuse_other(simulated=True)
