from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.errors import UserError
from harness.placement import Placement
from harness.routing import certify, make_routing
from harness.routing.trace import HEADER_KEY, SHIPPED, Header, Recorded, Writer, read_trace, write_trace
from harness.specs import Model, Workload
from harness.topology import Topology

NODES = Topology((2, 2))


def model(num_experts: int = 16, top_k: int = 4) -> Model:
    return Model(name="m", num_layers=2, hidden=8, ffn=8, num_experts=num_experts, top_k=top_k)


def header(**fields) -> Header:
    shapes = {"num_experts": 16, "top_k": 4, "num_layers": 2}
    about = {"model": "m", "corpus": "noise", "command": "none", "date": "2026-01-01"}
    return Header(**(shapes | about | fields))


def rows(num_tokens: int = 64, num_experts: int = 16) -> list[Recorded]:
    rng = np.random.default_rng(0)
    made = []
    for step in (5, 50):
        for layer in (0, 1):
            ids = rng.random((num_tokens, num_experts)).argsort(1)[:, :4].astype(np.int32)
            weights = -np.sort(-rng.dirichlet(np.ones(4), num_tokens), axis=1)
            made.append(Recorded(step, layer, ids, weights.astype(np.float32), 1.5))
    return made


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.parquet"
    write_trace(path, header(), rows())
    return path


def read_whole(path: Path) -> dict[tuple[int, int], Recorded]:
    """Every row, read."""
    return dict(read_trace(path).items())


def workload(path: Path | str, tokens: int | tuple[int, ...] = 16, **params) -> Workload:
    return Workload(name="w", tokens_per_rank=tokens, generator="trace", params={"path": str(path), **params})


@pytest.mark.parametrize("num_experts", [16, 300])
def test_what_is_written_is_read(tmp_path, num_experts):
    path = tmp_path / "deep" / "t.parquet"
    written = rows(num_experts=num_experts)
    write_trace(path, header(num_experts=num_experts), written)
    read = read_trace(path)
    assert read.header == header(num_experts=num_experts)
    assert (read.steps, read.layers) == ([5, 50], [0, 1])
    for row in written:
        again = read[row.step, row.layer]
        assert np.array_equal(again.ids, row.ids)
        assert np.abs(again.weights - row.weights).max() <= 0.5 / 255 + 1e-6
        assert again.loss == row.loss
    assert [file.name for file in path.parent.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("group_bytes", [1, 1 << 20])  # a group before the last one, and the last, are written aside
def test_a_failed_write_leaves_the_old_file_alone(trace, monkeypatch, group_bytes):
    before = trace.read_bytes()
    monkeypatch.setattr("harness.routing.writing.GROUP_BYTES", group_bytes)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_trace(trace, header(), rows())
    assert trace.read_bytes() == before
    assert list(trace.parent.iterdir()) == [trace]


def test_a_reader_of_the_old_file_keeps_it_whole(trace):
    before = trace.read_bytes()
    with trace.open("rb") as old:
        write_trace(trace, header(corpus="other noise"), rows())
        assert old.read() == before
    assert read_trace(trace).header.corpus == "other noise"


def test_ranks_take_the_first_tokens_in_order(trace):
    recorded = rows()
    found = make_routing(workload(trace, (3, 0, 5, 2), step=5), model(), NODES)
    assert found is not None
    assert np.array_equal(found.ids, recorded[0].ids[:10])
    assert np.array_equal(found.of_rank(2), recorded[0].ids[3:8])


def test_steps_layers_and_the_best_k(trace):
    recorded = {(row.step, row.layer): row.ids for row in rows()}

    def ids(m: Model | None = None, **at) -> np.ndarray:
        found = make_routing(workload(trace), m or model(), NODES, **at)
        assert found is not None
        return found.ids

    assert np.array_equal(ids(), recorded[50, 0])  # the last step
    assert np.array_equal(ids(layer=1), recorded[50, 1])
    assert np.array_equal(ids(m=model(top_k=2)), recorded[50, 0][:, :2])
    found = make_routing(workload(trace, step=5, layer=1), model(), NODES, step=7)
    assert found is not None
    assert np.array_equal(found.ids, recorded[5, 1])


@pytest.mark.parametrize(
    ("m", "work", "at", "parts"),
    [
        (model(num_experts=8), {}, {}, ["model.num_experts: 8", "16 experts"]),
        (model(top_k=5), {}, {}, ["model.top_k: 5", "k = 4"]),
        (model(), {"tokens": 17}, {}, ["w.tokens_per_rank: 17", "68 tokens", "has 64"]),
        (model(), {"layer": 2}, {}, ["params.layer: 2", "layers 0, 1"]),
        (model(), {"layer": 1}, {"layer": 1}, ["params.layer: 2", "layers 0, 1"]),
        (model(), {"step": 6}, {}, ["params.step: 6", "steps 5, 50"]),
        (model(), {"stride": 1}, {}, ["params.stride: 1", "known fields are path, layer, step, replay, hold"]),
    ],
)
def test_a_trace_that_does_not_fit(trace, m, work, at, parts):
    with pytest.raises(UserError) as error:
        make_routing(workload(trace, **work), m, NODES, **at)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def rewritten(path: Path, change) -> Path:
    table = pq.read_table(path)
    meta = json.loads(table.schema.metadata[HEADER_KEY])
    table, meta = change(table, meta)
    table = table.replace_schema_metadata({HEADER_KEY: json.dumps(meta)} if meta is not None else None)
    pq.write_table(table, path)
    return path


def flipped(table: pa.Table) -> pa.Table:
    ids = [b"\xff" * len(value.as_py()) for value in table["ids"]]
    return table.set_column(table.schema.get_field_index("ids"), "ids", pa.array(ids, pa.binary()))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda table, meta: (table, None), ["no moebench header", "moebench record"]),
        (lambda table, meta: (table, {**meta, "schema_version": 3}), ["schema_version 3", "upgrade moebench"]),
        (lambda table, meta: (table, {}), ["damaged header"]),
        (lambda table, meta: (table, {**meta, "top_k": 5}), ["is damaged", "moebench record"]),
        (lambda table, meta: (table, {**meta, "num_experts": 0}), ["is damaged", "header.num_experts"]),
        (lambda table, meta: (table.drop_columns(["weights"]), meta), ["is damaged", "weights"]),
        (lambda table, meta: (flipped(table), meta), ["is damaged", "step 5, layer 0"]),
        (lambda table, meta: (table, {**meta, "num_layers": 1}), ["is damaged", "layer 1 of 1"]),
    ],
)
def test_a_file_that_is_not_a_sound_trace(trace, change, parts):
    path = rewritten(trace, change)
    with pytest.raises(UserError) as error:
        read_whole(path)
    assert "\n" not in str(error.value)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def spoilt(**changed: object) -> Recorded:
    """A row of which something is wrong."""
    given = {"step": 0, "layer": 0, "ids": np.array([[0, 1], [2, 3]]), "weights": np.full((2, 2), 0.5), "loss": 1.0}
    return Recorded(**{**given, **changed})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (spoilt(ids=np.array([[0, 1], [2, -1]])), "step 0, layer 0: ids: token 1: -1: there is no expert -1 of 4"),
        (spoilt(ids=np.array([[0, 1], [300, 3]])), "token 1: 300: there is no expert 300 of 4"),
        (spoilt(ids=np.array([[0, 1], [3, 3]])), "token 1: 3: is chosen twice"),
        (spoilt(ids=np.array([[0, 1.5], [2, 3]])), "token 0: 1.5: expert ids must be whole numbers"),
        (spoilt(ids=np.array([[0, np.nan], [2, 3]])), "token 0: nan: expert ids must be whole numbers"),
        (spoilt(ids=np.array([[True, False], [True, False]])), "'bool': expert ids must be whole numbers"),
        (spoilt(ids=np.array([[0, 1, 2], [2, 3, 0]])), "must both be"),
        (spoilt(weights=np.full((2, 3), 0.5)), "must both be"),
        (spoilt(weights=np.array([[0.5, np.nan], [0.5, 0.5]])), "weights: nan: must lie in 0..1"),
        (spoilt(weights=np.array([[0.5, -0.5], [0.5, 0.5]])), "weights: -0.5: must lie in 0..1"),
        (spoilt(weights=np.array([[0.5, 2.0], [0.5, 0.5]])), "weights: 2.0: must lie in 0..1"),
        (spoilt(layer=2), "layer 2 of 1 is none"),
        (spoilt(step=-1), "-1: step is none"),
    ],
)
def test_neither_writer_nor_reader_takes_what_is_no_routing(row, said, tmp_path, monkeypatch):
    header = Header(model="m", num_experts=4, top_k=2, num_layers=1, corpus="", command="", date="")
    path = tmp_path / "trace.parquet"
    with pytest.raises(UserError) as refused:
        write_trace(path, header, [row])
    assert said in str(refused.value)
    assert not path.exists()
    stored_as_bytes = row.ids.shape == (2, 2) and row.weights.shape == (2, 2) and "weights:" not in said
    if stored_as_bytes and np.issubdtype(row.ids.dtype, np.integer) and row.ids.min() >= 0 and row.ids.max() < 256:
        monkeypatch.setattr("harness.routing.writing.check_row", lambda *_: None)  # a writer that checks nothing
        write_trace(path, header, [row])
        monkeypatch.undo()
        with pytest.raises(UserError, match="is damaged"):
            read_whole(path)


def test_a_step_and_layer_that_stand_twice(tmp_path):
    header = Header(model="m", num_experts=4, top_k=2, num_layers=1, corpus="", command="", date="")
    with pytest.raises(UserError, match="give each step and layer once"):
        write_trace(tmp_path / "trace.parquet", header, [spoilt(), spoilt()])


@pytest.mark.parametrize("content", [b"", b"not parquet at all", None])
def test_a_corrupt_file(trace, content):
    whole = trace.read_bytes()
    trace.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_trace(trace)


def test_damaged_bytes_never_pass_silently(trace):
    """Whatever byte is hit: a UserError that names the file, or the same routing; never another exception."""
    whole = trace.read_bytes()
    refused = 0
    for position in range(0, len(whole), max(1, len(whole) // 100)):
        trace.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            found = read_whole(trace)
        except UserError:
            refused += 1
            continue
        for row in rows():
            assert np.array_equal(found[row.step, row.layer].ids, row.ids)
    assert refused > 40


def test_a_missing_file():
    with pytest.raises(UserError, match=r"nowhere\.parquet.*No such file"):
        make_routing(workload("nowhere.parquet"), model(), NODES)


def test_the_shipped_trace():
    """Found by its bare name; 8 ranks of 2,048 tokens; every layer, early to late; really skewed."""
    path = SHIPPED / "record-e64k8.parquet"
    assert path.stat().st_size <= 5e6
    found = read_trace(path)
    assert (found.header.num_experts, found.header.top_k, found.layers) == (64, 8, [0, 1, 2, 3])
    assert len(found.steps) >= 3
    assert "moebench record --model record-e64k8" in found.header.command
    assert found[found.steps[0], 0].loss > found[found.steps[-1], 0].loss
    topology, m = Topology((2, 4)), model(64, 8)
    for layer in found.layers:
        routing = make_routing(workload(path.name, 2048), m, topology, layer=layer)
        assert routing is not None
        certificate = certify(routing, Placement.contiguous(64, 8), topology)
        assert certificate.max_over_mean["expert"] > 1.1
        assert not certificate.balanced


def test_a_damaged_row_costs_itself_alone(trace):
    """Opening reads the header and the index; a row is read and checked when it is asked for."""

    def change(table: pa.Table, meta: dict) -> tuple[pa.Table, dict]:
        ids = [value.as_py() for value in table["ids"]]
        ids[3] = ids[3][::-1]
        return table.set_column(table.schema.get_field_index("ids"), "ids", pa.array(ids, pa.binary())), meta

    text = pq.read_metadata(trace).metadata[HEADER_KEY]
    table, _ = change(pq.read_table(trace), {})
    pq.write_table(table.replace_schema_metadata({HEADER_KEY: text}), trace)
    found = read_trace(trace)
    assert np.array_equal(found[50, 0].ids, rows()[2].ids)
    assert found.counts(50, 1).sum() == 64 * 4
    with pytest.raises(UserError, match="step 50, layer 1: its tokens are not those of its digest"):
        found[50, 1]


def test_a_writer_writes_all_or_nothing(tmp_path):
    def half() -> None:
        with Writer(tmp_path / "t.parquet", header()) as writer:
            writer.add(rows()[0])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        half()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"header\.top_k: 17"):
        Writer(tmp_path / "t.parquet", header(top_k=17))
