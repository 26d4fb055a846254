"""Each input that is no routing is refused, on one line that names file, place and remedy, and nothing is written."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.routing.test_importing import EXPERTS, counts, ids, lines, refused, weights


def spoilt(**changed: object) -> dict:
    return {name: value for name, value in ({"ids": ids()} | changed).items() if value is not None}


def at(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    array = array.astype(type(value))
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "wanted", "parts"),
    [
        (spoilt(ids=at(ids(), (1, 0, 4, 1), -1)), {}, ["a.npz", "step 1, layer 0", "token 4", "no expert -1 of 5"]),
        (spoilt(ids=at(ids(), (1, 0, 4, 1), 5)), {}, ["step 1, layer 0", "token 4", "no expert 5 of 5"]),
        (spoilt(ids=at(ids(), (2, 1, 0, 0), 1.5)), {}, ["step 2, layer 1", "token 0", "1.5", "whole numbers"]),
        (spoilt(ids=at(ids(), (2, 1, 0, 0), float("nan"))), {}, ["step 2, layer 1", "nan", "whole numbers"]),
        (spoilt(ids=np.zeros((1, 1, 3, 2), int)), {}, ["token 0", "chosen twice"]),
        (spoilt(ids=ids()[None]), {}, ["[1, 3, 2, 6, 2]", "must be [steps, layers, tokens, k]"]),
        (spoilt(ids=ids()[0, 0, 0]), {}, ["[2]", "must be [steps, layers, tokens, k]"]),
        (spoilt(), {"top_k": 3}, ["--top-k: 3", "has 2"]),
        (spoilt(), {"num_experts": None}, ["--experts", "give it"]),
        (spoilt(), {"num_experts": 1}, ["--top-k: 2", "1..1"]),
        (spoilt(weights=weights()[..., :1]), {}, ["weights", "must be as ids"]),
        (spoilt(weights=at(weights(), (0, 0, 0, 0), float("nan"))), {}, ["step 0, layer 0: weights: nan"]),
        (spoilt(rank_tokens=[3, 4]), {}, ["rank_tokens", "must sum to 6"]),
        (spoilt(steps=[1, 1, 2]), {}, ["a.npz: steps", "twice"]),
        (spoilt(steps=[1, 2]), {}, ["steps", "must be 3 whole numbers"]),
        (spoilt(colour=[1, 2]), {}, ["colour", "known arrays are ids"]),
        (spoilt(counts=counts()), {}, ["ids or counts, one of the two"]),
        (spoilt(), {"num_ranks": 4}, ["--ranks: 4", "does not divide"]),
        (spoilt(), {"kind": "counts"}, ["--kind", "has tokens"]),
        (spoilt(), {"format": "xml"}, ["--format: 'xml'", "known formats are npz"]),
        (spoilt(ids=None, counts=counts()), {"top_k": None}, ["--top-k", "give it"]),
        (
            spoilt(ids=None, counts=at(counts(), (1, 0, 1, 2), -1)),
            {"top_k": 2},
            ["step 1, layer 1", "rank 0, expert 2"],
        ),
        (spoilt(ids=None, counts=at(counts(), (1, 1, 0, 0), 0.5)), {"top_k": 2}, ["step 1, layer 0", "rank 1", "0.5"]),
        (spoilt(ids=None, counts=counts() + 1), {"top_k": 2}, ["do not sum to tokens x k: k = 2"]),
        (
            spoilt(ids=None, counts=[[[4, 0, 0, 0]]]),
            {"top_k": 2, "num_experts": None},
            ["expert 0", "above the 2 tokens"],
        ),
        (spoilt(ids=None, counts=counts()), {"top_k": 2, "num_experts": 6}, ["--experts: 6", "has 5"]),
        (
            spoilt(ids=None, counts=[[[2**40, 2**40]]]),
            {"top_k": 2, "num_experts": None},
            ["expert 0", "at most 2147483647"],
        ),
        (spoilt(ids=None, counts=[1, 2]), {"top_k": 2}, ["counts", "must be [steps, layers, experts]"]),
    ],
)
def test_arrays_that_are_no_routing(arrays, wanted, parts, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path, "a.npz", {"num_experts": EXPERTS} | wanted, parts)


def row(**changed: object) -> dict:
    return {"step": 0, "layer": 0, "ids": [0, 1]} | changed


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([row(), row(ids=[0])], ["a.jsonl", "line 2", "k = 2"]),
        ([row(), row(ids=[0, 1.5])], ["token 1", "1.5", "whole numbers"]),
        ([row(), row(ids=[0, None])], ["token 1", "nan", "whole numbers"]),
        ([row(), row(ids=None)], ["line 2", "missing"]),
        ([row(), row(ids=["a", "b"])], ["a.jsonl", "line"]),
        ([row(step=-1)], ["step, line 1", "-1", "from 0 on"]),
        ([row(step=0.5)], ["step, line 1", "0.5"]),
        ([row(), row(layer=1), row(step=1)], ["step 1", "layer 1 is missing", "layers [0, 1]"]),
        ([row(), row(step=1), row(step=1, layer=1)], ["step 1", "layer 1 is one more"]),
        ([row(), row(step=1), row(step=0)], ["step 0, layer 0", "twice"]),
        ([row(rank=0), row(rank=2)], ["rank 1", "missing"]),
        ([row(ids=[[0, 1], [2]])], ["line 1", "ragged"]),
        ([row(ids=[[[[0, 1]]]])], ["line 1", "[tokens, k]"]),
        ([{"step": 0, "text": "x"}], ["a.jsonl", "column ids or a column counts"]),
        ([{"step": 0, "counts": [1, 1, 0]}] * 2, ["line 2", "twice"]),
        ([{"step": 0, "rank": 0, "counts": [1, 1]}, {"step": 0, "rank": 1, "counts": [2, 1, 1]}], ["as many experts"]),
    ],
)
def test_tables_that_are_no_routing(rows, parts, tmp_path):
    lines(tmp_path / "a.jsonl", rows)
    refused(tmp_path, "a.jsonl", {"num_experts": None if "counts" in rows[0] else 4, "top_k": 2}, parts)


def spoilt_file(folder: Path, name: str) -> None:
    path = folder / name
    if name == "cut.npy":
        np.save(path, ids())
        path.write_bytes(path.read_bytes()[:-5])
    elif name == "cut.npz":
        np.savez(path, ids=ids())
        path.write_bytes(path.read_bytes()[:-30])
    elif name == "cut.parquet":
        pq.write_table(pa.table({"ids": [[0, 1]] * 100}), path)
        path.write_bytes(path.read_bytes()[:-30])
    elif name == "cut.pt":
        torch.save(torch.from_numpy(ids()), path)
        path.write_bytes(path.read_bytes()[:-300])
    elif name == "objects.npy":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif name == "objects.pt":
        torch.save({"ids": Path("x")}, path)
    elif name == "pickle.pkl" or name == "pickle.npy":
        path.write_bytes(pickle.dumps(ids()))
    elif name == "turned.npy":
        np.save(path, np.asfortranarray(ids()))
    elif name.startswith("words"):
        path.write_text("what is this\nno really\n")
    elif name == "half.csv":
        path.write_text("step,layer,id0,id2\n0,0,1,2\n")
    elif name == "fraction.csv":
        path.write_text("step,layer,id0,id1\n0,0,1,2.5\n")
    elif not name.startswith("none"):
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cut.npy", "cut off"),
        ("cut.npz", "cannot be read"),
        ("cut.parquet", "cannot be read"),
        ("cut.pt", "cannot be read"),
        ("objects.npy", "is a pickle"),
        ("objects.pt", "a pickle is not opened"),
        ("pickle.pkl", "a pickle is not opened"),
        ("pickle.npy", "cannot be read"),
        ("turned.npy", "Fortran order"),
        ("words.jsonl", "line 1 on"),
        ("words.csv", "column ids or a column counts"),
        ("words.npz", "cannot be read"),
        ("words.parquet", "cannot be read"),
        ("half.csv", "no number 1 of these"),
        ("fraction.csv", "2.5"),
        ("empty.npy", "is empty"),
        ("empty.jsonl", "is empty"),
        ("none.npz", "no such file"),
    ],
)
def test_files_that_are_none(name, said, tmp_path):
    spoilt_file(tmp_path, name)
    refused(tmp_path, name, {"num_experts": EXPERTS}, [name, said])


def test_ranks_with_other_steps(tmp_path):
    (tmp_path / "m").mkdir()
    lines(tmp_path / "m" / "0.jsonl", [row(), row(step=1)])
    lines(tmp_path / "m" / "1.jsonl", [row()])
    refused(tmp_path, "m", {"num_experts": 4}, ["1.jsonl", "has not the steps of 0.jsonl"])
