"""Every format in and out again, equal to the bit, and what servers and trainers write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harness.errors import UserError
from harness.routing.ahead import ahead
from harness.routing.exporting import FORMATS, export_trace
from harness.routing.importing import Imported, Wanted, import_trace
from harness.routing.trace import Trace, read_trace

STEPS, LAYERS, RANKS, TOKENS, K, EXPERTS = 3, 2, 2, 6, 2, 5


def ids(seed: int = 0) -> np.ndarray:
    """[S, L, T, k]."""
    shape = (STEPS, LAYERS, TOKENS, EXPERTS)
    return np.random.default_rng(seed).random(shape).argsort(-1)[..., :K].astype(np.uint8)


def weights() -> np.ndarray:
    return np.random.default_rng(1).random((STEPS, LAYERS, TOKENS, K)).astype(np.float32)


def counts() -> np.ndarray:
    """[S, R, L, E], of tokens that are half of each rank."""
    halves = ids().reshape(STEPS, LAYERS, RANKS, TOKENS // RANKS * K)
    return np.stack([np.stack([(halves == e).sum(-1) for e in range(EXPERTS)], -1)])[0].swapaxes(1, 2)


def imported(source: Path | list[Path], out: Path, **wanted) -> tuple[Imported, Trace]:
    made = import_trace([source] if isinstance(source, Path) else source, out, Wanted(**wanted))
    return made, read_trace(out)


def same(one: Trace, other: Trace) -> None:
    assert list(one) == list(other)
    assert (one.header.kind, one.header.num_experts, one.header.top_k) == (
        other.header.kind, other.header.num_experts, other.header.top_k
    )  # fmt: skip
    for key in one:
        a, b = one[key], other[key]
        assert np.array_equal(a.ids, b.ids)
        assert a.weights.tobytes() == b.weights.tobytes()
        assert (a.ranks, repr(a.loss)) == (b.ranks, repr(b.loss))
        assert np.array_equal(one.counts(*key), other.counts(*key))


def refused(folder: Path, name: str, wanted: dict, parts: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}
    with pytest.raises(UserError) as error:
        imported(folder / name, folder / "t.parquet", **wanted)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.iterdir())} == before


@pytest.fixture
def of_tokens(tmp_path) -> Trace:
    np.savez(
        tmp_path / "source.npz", ids=ids(), weights=weights(), steps=[4, 5, 9], loss=[2.5, 2.25, np.nan],
        rank_tokens=[4, 2], num_experts=EXPERTS,
    )  # fmt: skip
    return imported(tmp_path / "source.npz", tmp_path / "t.parquet")[1]


@pytest.fixture
def of_counts(tmp_path) -> Trace:
    np.savez(tmp_path / "counts.npz", counts=counts())
    return imported(tmp_path / "counts.npz", tmp_path / "c.parquet", top_k=K)[1]


def test_what_is_imported_is_what_is_read(of_tokens):
    assert of_tokens.steps == [4, 5, 9]
    for (step, layer), row in of_tokens.items():
        at = of_tokens.steps.index(step)
        assert np.array_equal(row.ids, ids()[at, layer])
        assert np.array_equal(row.weights, weights()[at, layer])
        assert row.ranks == (4, 2)
    assert of_tokens.loss(5, 1) == 2.25
    assert len(of_tokens.header.source["sha256"]) == 64


def test_counts_become_tokens_that_have_them(of_counts):
    assert of_counts.header.kind == "counts"
    assert "drawn from counts" in of_counts.header.rule
    drawn = set()
    for (step, layer), row in of_counts.items():
        wanted = counts()[step, :, layer]
        assert np.array_equal(of_counts.counts(step, layer), wanted)
        assert row.ranks == (3, 3)
        assert all(len(set(token)) == K for token in row.ids.tolist())
        for rank in range(RANKS):
            own = row.ids[3 * rank : 3 * rank + 3]
            assert np.array_equal(np.bincount(own.ravel(), minlength=EXPERTS), wanted[rank])
        drawn.add(row.ids.tobytes())
    assert len(drawn) > 1


def test_tokens_of_counts_never_change():
    """They are a part of every experiment on them."""
    from harness.routing.loops import draw

    found = draw(np.array([[3, 2, 1, 2], [0, 4, 4, 0]]), 2, 7, 5, 1)
    assert found.tolist() == draw(np.array([[3, 2, 1, 2], [0, 4, 4, 0]]), 2, 7, 5, 1).tolist()
    assert found.tolist() != draw(np.array([[3, 2, 1, 2], [0, 4, 4, 0]]), 2, 8, 5, 1).tolist()
    assert sorted(map(sorted, found[4:].tolist())) == [[1, 2]] * 4
    assert found.tolist() == [[1, 3], [0, 3], [1, 0], [0, 2], [2, 1], [2, 1], [2, 1], [2, 1]]


@pytest.mark.parametrize("suffix", [each for each in FORMATS if each != "npy"])
@pytest.mark.parametrize("kind", ["of_tokens", "of_counts"])
def test_out_and_in_again(kind, suffix, tmp_path, request):
    trace = request.getfixturevalue(kind)
    export_trace(trace, tmp_path / f"counts-out.{suffix}" if kind == "of_counts" else tmp_path / f"out.{suffix}")
    source = next(tmp_path.glob(f"*out.{suffix}"))
    wanted = {} if suffix in ("npz", "pt") else {"num_experts": EXPERTS, "top_k": K}
    same(trace, imported(source, tmp_path / "again.parquet", **wanted)[1])


def test_one_bare_array(of_tokens, of_counts, tmp_path):
    with pytest.raises(UserError, match="would lose weights, loss, rank_tokens, numbers of steps"):
        export_trace(of_tokens, tmp_path / "ids.npy")
    assert not (tmp_path / "ids.npy").exists()
    export_trace(of_counts, tmp_path / "counts.npy")
    same(of_counts, imported(tmp_path / "counts.npy", tmp_path / "again.parquet", top_k=K)[1])


@pytest.mark.parametrize("array", [ids()[0], ids()[0, 0], ids().astype(np.int64), ids().astype(np.float64)])
def test_without_steps_or_layers_and_of_any_number_type(array, tmp_path):
    np.save(tmp_path / "ids.npy", array)
    _, found = imported(tmp_path / "ids.npy", tmp_path / "t.parquet", num_experts=EXPERTS, num_ranks=3)
    assert np.array_equal(found[0, 0].ids, ids()[0, 0])
    assert found.ranks(0, 0) == (2, 2, 2)


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_for_each_token(tmp_path):
    rows = [
        {"step": s, "layer": layer + 3, "rank": t // 3, "ids": ids()[s, layer, t].tolist(), "prompt": "x"}
        for s in range(STEPS) for layer in range(LAYERS) for t in range(TOKENS)
    ]  # fmt: skip
    _, found = imported(lines(tmp_path / "a.jsonl", rows), tmp_path / "t.parquet", num_experts=EXPERTS)
    assert (found.layers, found.header.details["layers"]) == ([0, 1], "3, 4")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    same(found, imported(tmp_path / "a.parquet", tmp_path / "u.parquet", num_experts=EXPERTS)[1])
    assert found.ranks(2, 1) == (3, 3)
    assert np.array_equal(found[2, 1].ids, ids()[2, 1])


@pytest.mark.parametrize("num_experts", [EXPERTS, 300])
def test_ids_as_bytes(num_experts, tmp_path):
    kind = "u1" if num_experts <= 256 else "<u2"
    rows = [
        {"step": s, "layer": layer, "ids": ids()[s, layer].astype(kind).tobytes()}
        for s in range(STEPS) for layer in range(LAYERS)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    _, found = imported(tmp_path / "a.parquet", tmp_path / "t.parquet", num_experts=num_experts, top_k=K)
    assert np.array_equal(found[2, 1].ids, ids()[2, 1])
    refused(tmp_path, "a.parquet", {"num_experts": num_experts}, ["--top-k", "are bytes"])
    refused(tmp_path, "a.parquet", {"num_experts": num_experts, "top_k": 5}, ["a.parquet: ids", "k = 5"])


def test_what_is_read_ahead_comes_in_order_and_so_does_its_error():
    def items():
        yield from (1, None)
        raise KeyError("third")

    found = ahead(items())
    assert [next(found), next(found)] == [1, None]
    with pytest.raises(KeyError, match="third"):
        next(found)


def test_pieces_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.routing.tables.PIECE_BYTES", 64)
    test_a_row_for_each_token(tmp_path)


@pytest.mark.parametrize("rows", [
    [{"step": 7, "layer": 1, "ids": [3, 1]}, {"layer": 1, "step": 7, "x": {"a": ["}", "]"]}, "ids": [0, 12]}],
    [{"step": step, "ids": [[[1, 2], [3, 4]], [[0, 1], [2, 3]]]} for step in (0, 1)],
    [{"step": 0, "layer": layer, "rank": rank, "counts": [2, 1, 3]} for layer in (0, 1) for rank in (0, 1)],
])  # fmt: skip
def test_the_compiled_reader_of_lines_sees_what_the_general_one_does(rows, tmp_path, monkeypatch):
    wanted = {"top_k": 2, "num_experts": 13 if "ids" in rows[0] else None}
    _, slow = imported(lines(tmp_path / "a.jsonl", rows), tmp_path / "t.parquet", **wanted)
    monkeypatch.setattr("harness.routing.tables.FAST_BYTES", 0)
    monkeypatch.setattr("harness.routing.tables._rows_of", None)
    same(slow, imported(tmp_path / "a.jsonl", tmp_path / "u.parquet", **wanted)[1])


@pytest.mark.parametrize("text", [
    '{"ids": [1.5, 2]}', '{"ids": [-1, 2]}', '{"ids": [1, null]}', '{"ids": [1, [2]]}', '{"ids": [1, 2', '{"ids": 3}',
    '{"ids": [1, 2], "weights": [0.5, 0.5]}', '{"ids": [1], "ids": [2]}', '{"step": 1.5, "ids": [1]}', '["ids"]',
    '{"step": 1}', '{"ids": [1, 2], "counts": [1]}', '{"ids": [12345678901234567890]}',
    '{"ids": [1 2]}', '{"ids": [1, ]}', '{"ids": [, 1]}', '{"ids": [[1][2]]}', '{"ids": [1] "step": 2}', "x", "",
    '{"ids": [1]}\n{"ids": [[1]]}', '{"step": 1, "ids": [1]}\n{"ids": [1]}', '{"ids": [1], "a": "', '{"a\\"": 1}',
])  # fmt: skip
def test_whatever_else_it_leaves_to_the_general_one(text):
    from harness.routing import lines, tables

    assert lines.read(text.encode(), tables.CALLED, tables.NOT_FAST) is None


# ---- what servers and trainers write -----------------------------------------------------------------------------


def test_sglang(tmp_path):
    """Modes stat, per_pass and per_token of its expert recorder; 5 experts in 6 places."""
    places = torch.tensor([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 0]])  # physical -> logical
    total = torch.from_numpy(counts().sum(1))  # [S, L, E]
    stat = {"rank": 0, "logical_count": torch.cat([total, 0 * total[:1]]), "average_utilization_rate_over_window": None}
    torch.save(stat, tmp_path / "expert_distribution_recorder_1.0.pt")
    made, found = imported(tmp_path / "expert_distribution_recorder_1.0.pt", tmp_path / "t.parquet", top_k=K)
    assert (made.steps, made.read_as) == (STEPS, "SGLang, stat")
    assert np.array_equal(found.counts(2, 1)[0], total[2, 1])

    (tmp_path / "pass").mkdir(), (tmp_path / "token").mkdir()
    where = np.array([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])  # logical -> physical
    for rank in range(RANKS):
        passes, tokens = [], []
        for step in range(STEPS):
            physical = np.zeros((LAYERS, 6), np.int64)
            for layer in range(LAYERS):
                physical[layer, where[layer]] = counts()[step, rank, layer]
            head = {"forward_pass_id": 10 + step, "rank": rank, "gatherer_key": "primary"}
            passes.append({**head, "global_physical_count": torch.from_numpy(physical)})
            own = ids()[step, :, 3 * rank : 3 * rank + 3]
            chosen = np.stack([where[layer][own[layer]] for layer in range(LAYERS)])
            padded = np.concatenate([chosen, np.full((LAYERS, 2, K), -1)], axis=1)
            tokens.append({**head, "input_ids": [1, 2, 3], "topk_ids_of_layer": torch.from_numpy(padded)})
        for name, records in (("pass", passes), ("token", tokens)):
            torch.save({"records": records, "last_physical_to_logical_map": places}, tmp_path / name / f"{rank}.pt")
    _, by_pass = imported(tmp_path / "pass", tmp_path / "p.parquet", top_k=K)
    assert np.array_equal(by_pass.counts(12, 1)[0], total[2, 1])
    _, by_token = imported(tmp_path / "token", tmp_path / "u.parquet", num_experts=EXPERTS)
    assert by_token.ranks(11, 0) == (3, 3)
    assert np.array_equal(by_token[11, 1].ids, ids()[1, 1])


def test_vllm(tmp_path):
    """``routed_experts`` [tokens, layers, k] of an answer, with those of the prompt."""
    turned = ids()[0].swapaxes(0, 1).astype(np.int16)
    np.savez(tmp_path / "a.npz", prompt_routed_experts=turned[:4], routed_experts=turned[4:])
    np.save(tmp_path / "a.npy", turned)
    for name in ("a.npz", "a.npy"):
        _, found = imported(tmp_path / name, tmp_path / "t.parquet", num_experts=EXPERTS, format="vllm")
        assert np.array_equal(found[0, 1].ids, ids()[0, 1])


def test_megatron(tmp_path):
    """Its routing trace, a file a rank; and what its router replay has recorded."""
    (tmp_path / "m").mkdir()
    for rank in range(RANKS):
        head = {"stage": "pre_dispatch", "block": "decoder", "rank": rank, "num_tokens": 3, "topk": K}
        rows = [
            {"step": s, "layer": layer + 1, **head, "top_indices": ids()[s, layer, 3 * rank : 3 * rank + 3].tolist()}
            for s in range(STEPS) for layer in range(LAYERS)
        ]  # fmt: skip
        lines(tmp_path / "m" / f"rank{rank}.jsonl", [*rows, {**rows[-1], "layer": 1, "mtp_idx": 0}])
    _, found = imported(tmp_path / "m", tmp_path / "t.parquet", num_experts=EXPERTS)
    assert found.ranks(0, 0) == (3, 3)
    assert np.array_equal(found[2, 1].ids, ids()[2, 1])
    torch.save([torch.from_numpy(layer.astype(np.int64)) for layer in ids()[1]], tmp_path / "r.pt")
    _, found = imported(tmp_path / "r.pt", tmp_path / "u.parquet", num_experts=EXPERTS)
    assert np.array_equal(found[0, 1].ids, ids()[1, 1])


def test_deepspeed(tmp_path):
    """``exp_counts`` of its layer, a line a layer and rank."""
    rows = [
        {"step": s, "layer": layer, "rank": rank, "exp_counts": counts()[s, rank, layer].tolist()}
        for s in range(STEPS) for layer in range(LAYERS) for rank in range(RANKS)
    ]  # fmt: skip
    _, found = imported(lines(tmp_path / "d.jsonl", rows), tmp_path / "t.parquet", top_k=K)
    assert np.array_equal(found.counts(1, 0), counts()[1, :, 0])


def test_loads_of_a_replication_planner(tmp_path):
    """EPLB's ``weight`` [layers, experts], in any unit: nobody gets more tokens than there are."""
    np.save(tmp_path / "weight.npy", np.array([[90.0, 1, 1, 1, 1], [1, 2, 3, 4, 5]]))
    _, found = imported(tmp_path / "weight.npy", tmp_path / "t.parquet", top_k=K, format="loads", num_tokens=30)
    assert found.counts(0, 0)[0, 0] == 30
    assert found.counts(0, 0).sum() == found.counts(0, 1).sum() == 60
    assert found.counts(0, 1)[0].tolist() == [4, 8, 12, 16, 20]
    assert "scaled to 30 tokens" in found.header.source["loads"]


def test_neither_a_trace_nor_itself_is_imported(of_tokens, tmp_path):
    refused(tmp_path, "t.parquet", {}, ["is the source itself"])
    with pytest.raises(UserError, match="is a moebench trace already"):
        imported(tmp_path / "t.parquet", tmp_path / "other.parquet")


# ---- the command line --------------------------------------------------------------------------------------------


def test_from_counts_to_a_look_and_out(moebench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("counts.npz", counts=counts())
    status, out, err = moebench("trace", "import", "counts.npz", "--top-k", "2", "--out", "t.parquet", "--json")
    assert (status, json.loads(out)["steps"]) == (0, STEPS), err
    status, out, _ = moebench("trace", "show", "t.parquet", "--json")
    assert (status, json.loads(out)["num_experts"]) == (0, EXPERTS)
    status, out, _ = moebench("trace", "show", "t.parquet")
    assert status == 0
    assert "tokens are drawn from counts" in out
    assert moebench("trace", "export", "t.parquet", "--out", "u.jsonl")[0] == 0
    assert json.loads(Path("u.jsonl").read_text().splitlines()[0])["counts"] == counts()[0, 0, 0].tolist()
    status, out, err = moebench("trace", "import", "counts.npz", "--top-k", "3", "--out", "v.parquet")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "counts.npz" in err
    assert not Path("v.parquet").exists()
