from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.errors import UserError
from harness.layer.oracle import Oracle
from harness.layer.weights import Weights
from harness.routing.corpus import Corpus, python_corpus
from harness.routing.record import LocalMoE, record, steps_of
from harness.routing.trace import read_trace
from harness.specs import Model

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 200, np.uint8)
CORPUS = Corpus(TEXT, TEXT[:2000], "a fox")


def model(**fields) -> Model:
    shapes = {"num_layers": 2, "hidden": 32, "ffn": 16, "num_experts": 8, "top_k": 2, "gate": "softmax_topk"}
    return Model(**({"name": "tiny", "num_heads": 4, "seq": 16, "vocab": 256} | shapes | fields))


def made(path, **fields):
    given = {"num_steps": 20, "num_tokens": 128, "batch": 8, "learning_rate": 1e-2, "num_threads": 1, "corpus": CORPUS}
    return record(model(), path, **(given | fields))


def test_loss_falls_and_the_seed_makes_the_trace(tmp_path):
    heard = []
    first = made(tmp_path / "a.parquet", progress=heard.append, command="moebench record")
    again = made(tmp_path / "b.parquet")
    other = made(tmp_path / "c.parquet", seed=1)

    assert first.loss[20] < 0.8 * first.loss[1]
    assert [(p.step, p.num_steps) for p in heard] == [(step, 20) for step in range(1, 21)]
    assert heard[-1].loss < 0.8 * heard[0].loss
    assert first.digests == again.digests
    assert first.loss == again.loss
    assert first.digests != other.digests

    trace = read_trace(first.path)
    assert trace.steps == [1, 2, 8, 20]
    assert trace.layers == [0, 1]
    assert trace.header.command == "moebench record"
    assert trace.header.details["seed"] == 0
    row = trace[20, 1]
    assert row.ids.shape == (128, 2)
    assert row.loss == first.loss[20]
    assert np.abs(row.weights.sum(1) - 1).max() < 0.01
    assert (row.weights[:, 0] >= row.weights[:, 1]).all()  # best first
    assert trace[1, 0].ids.tolist() != trace[20, 0].ids.tolist()
    load = np.bincount(row.ids.ravel(), minlength=8)
    assert first.max_over_mean[20][1] == pytest.approx(load.max() / load.mean())


def test_choices_alone_of_a_span_of_steps(tmp_path):
    whole, alone = (tmp_path / name for name in ("a.parquet", "b.parquet"))
    steps = steps_of(["1", "3-5"], 20)
    assert made(whole, steps=steps).digests == made(alone, steps=steps, gate_weights=False).digests
    trace = read_trace(alone)
    assert trace.steps == [1, 3, 4, 5]
    assert (trace[4, 1].ids.shape, trace[4, 1].weights.shape) == ((128, 2), (0, 2))
    assert alone.stat().st_size < whole.stat().st_size


def test_the_balance_loss_balances(tmp_path):
    free = made(tmp_path / "a.parquet", balance=0.0)
    held = made(tmp_path / "b.parquet", balance=1.0)
    assert sum(held.max_over_mean[20]) < sum(free.max_over_mean[20])


@pytest.mark.parametrize("fields", [{}, {"num_shared_experts": 2, "ffn_type": "swiglu"}], ids=str)
def test_its_moe_layer_is_the_oracles(fields):
    shapes = model(**fields)
    moe = LocalMoE(shapes, layer=1, seed=3)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    y = Oracle(Weights(shapes, "float32", 3, 1))(x.double())
    assert (moe(x).double() - y).abs().max() < 1e-5 * y.abs().max()
    assert moe.balance_loss.item() >= 0.9


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"steps": [21]}, r"record\.steps: \[21\]: must lie in 0\.\.20"),
        ({"steps": []}, r"record\.steps"),
        ({"num_tokens": 100}, r"--tokens: 100.*seq = 16"),
        ({"balance": -0.1}, r"--balance: -0\.1: must be a number from 0 on"),
        ({"balance": float("nan")}, r"--balance: nan"),
    ],
)
def test_bad_requests_are_named(tmp_path, fields, text):
    with pytest.raises(UserError, match=text):
        made(tmp_path / "a.parquet", **fields)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_holds_no_bytes(tmp_path):
    with pytest.raises(UserError, match=r"model\.vocab: 255"):
        record(model(vocab=255), tmp_path / "a.parquet")


def test_an_output_that_cannot_be_written_is_known_before_training(tmp_path):
    (tmp_path / "file").touch()
    heard = []
    for out in (tmp_path, tmp_path / "file" / "t.parquet"):
        with pytest.raises(UserError, match=r"cannot be written.*--out"):
            made(out, progress=heard.append)
    assert heard == []


def test_threads_are_given_back(tmp_path):
    before = torch.get_num_threads()
    made(tmp_path / "a.parquet", num_steps=1, num_threads=before + 1)
    assert torch.get_num_threads() == before


def test_the_standard_library_is_text_enough():
    corpus = python_corpus()
    assert len(corpus.train) > 5_000_000
    assert len(corpus.held) > 128 * 129
    assert b"import" in corpus.train.tobytes()
    windows = corpus.held_windows(128, 129)
    assert windows.shape == (128, 129)
    assert windows.max() < 256
    assert np.array_equal(windows, python_corpus().held_windows(128, 129))
    for window in windows[::32]:
        assert window.astype(np.uint8).tobytes() not in corpus.train.tobytes()
