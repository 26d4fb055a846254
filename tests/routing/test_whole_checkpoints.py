"""A trace is written from a whole checkpoint and from whole sequences, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.errors import UserError
from harness.routing import by_layer
from harness.routing.huggingface import record_checkpoint
from harness.routing.trace import read_trace

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file, save_file

from tests.routing import checkpoints

IDS = np.random.default_rng(0).integers(2, 250, 2 * 96)


def saved(folder, model_type, shards="1GB"):
    checkpoints.model(checkpoints.config(model_type, 8, 2)).save_pretrained(folder, max_shard_size=shards)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("made") / "mixtral", "mixtral")


@pytest.fixture
def broken(mixtral, tmp_path):
    """A copy to break, and what to break it with."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in mixtral.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder, load_file(folder / "model.safetensors")


def record(folder, tmp_path, **fields):
    ids = tmp_path / "ids.npy"
    np.save(ids, IDS)
    given = {"num_tokens": 96, "seq": 24, "token_ids": ids, "device": "cpu", "layerwise": False}
    out = tmp_path / "t.parquet"
    record_checkpoint(folder, out, **(given | fields))
    return read_trace(out)


def refused(folder, tmp_path, match, **fields):
    with pytest.raises(UserError, match=match) as error:
        record(folder, tmp_path, **fields)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_weight_is_missing(broken, tmp_path, layerwise):
    folder, weights = broken
    for name in [name for name in weights if "layers.1." in name and "gate.weight" in name]:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, tmp_path, r"checkpoint: .*lacks model\.layers\.1\..*gate\.weight; download", layerwise=layerwise)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_weight_is_no_number(broken, tmp_path, layerwise):
    folder, weights = broken
    name = next(name for name in weights if "layers.1.self_attn.q_proj" in name)
    weights[name][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, tmp_path, r"layers\.1\.self_attn\.q_proj\.weight holds NaN", layerwise=layerwise)


def test_a_weight_has_another_shape(broken, tmp_path):
    folder, weights = broken
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, tmp_path, r"checkpoint: ")


@pytest.mark.parametrize("damage", ["truncated", "empty", "no json", "a list"])
def test_damaged_files(broken, tmp_path, damage):
    folder, _ = broken
    path = folder / ("config.json" if damage in ("no json", "a list") else "model.safetensors")
    text = path.read_bytes()
    path.write_bytes({"truncated": text[:-1000], "empty": b"", "no json": b"{", "a list": b"[]"}[damage])
    refused(folder, tmp_path, r"checkpoint: .*cannot be loaded")


def test_a_shard_is_missing(tmp_path):
    folder = saved(tmp_path / "model", "mixtral", "60KB")
    next(folder.glob("*-00002-*.safetensors")).unlink()
    refused(folder, tmp_path, r"checkpoint: .*cannot be loaded")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_tokens": 97}, r"--tokens: 97: .*24 tokens; give 96, or another --seq"),
        ({"num_tokens": 10}, r"--tokens: 10: .*give 24"),
        ({"seq": 65}, r"record\.seq: 65: .*2\.\.64"),
        ({"seq": 1}, r"record\.seq: 1: "),
        ({"passes": 3}, r"--tokens: 288: .*only 192 tokens"),
    ],
)
def test_sequences_are_as_long_as_asked(mixtral, tmp_path, fields, match):
    refused(mixtral, tmp_path, match, **fields)


@pytest.mark.parametrize(
    ("name", "made", "match"),
    [
        ("ids.txt", "1 2 256", r"--token-ids: .*holds 256; .*0 to 255"),
        ("ids.txt", "1 -2", r"holds -2"),
        ("ids.txt", "1 2.5", r"holds no whole numbers"),
        ("ids.npy", np.array([1.5]), r"holds float64"),
        ("ids.npy", np.array([{}]), r"holds no whole numbers"),
        ("ids.npy", b"", r"holds no whole numbers"),
    ],
)
def test_token_ids_that_are_none(mixtral, tmp_path, name, made, match):
    path = tmp_path / f"my-{name}"
    if isinstance(made, np.ndarray):
        np.save(path, made, allow_pickle=True)
    else:
        path.write_bytes(made if isinstance(made, bytes) else made.encode())
    refused(mixtral, tmp_path, match, token_ids=path)


def test_texts_that_are_none(mixtral, tmp_path):
    path = tmp_path / "text.txt"
    refused(mixtral, tmp_path, r"--text: .*cannot be read", token_ids=None, text=path)
    path.write_bytes(b"abc\xff")
    refused(mixtral, tmp_path, r"--text: .*no UTF-8 text \(byte 3\)", token_ids=None, text=path)


def test_passes_are_steps_and_batches_change_nothing(mixtral, tmp_path):
    one = record(mixtral, tmp_path, passes=2)
    assert (one.steps, one.layers) == ([0, 1], [0, 1])
    assert one.header.details["read"] in ("told", "probed")
    assert one.header.details["seq"] == 24
    together = record(mixtral, tmp_path, passes=2, batch=3)
    alone = record(mixtral, tmp_path)
    for (step, layer), row in one.items():
        assert np.array_equal(row.ids, together[step, layer].ids)
        assert step or np.array_equal(row.ids, alone[step, layer].ids)
    (tmp_path / "ids.txt").write_text(" ".join(map(str, IDS[96:])))
    second = record(mixtral, tmp_path, token_ids=tmp_path / "ids.txt")
    assert np.array_equal(second[0, 1].ids, one[1, 1].ids)
    assert not np.array_equal(one[0, 1].ids, one[1, 1].ids)
    (tmp_path / "text").write_bytes(bytes(IDS[:96].clip(0, 127).tolist()))
    written = record(mixtral, tmp_path, token_ids=None, text=tmp_path / "text")
    assert "as bytes" in written.header.corpus
    assert written.header.corpus.startswith("text, sha256 ")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_layer_by_layer_is_the_whole_model(tmp_path, monkeypatch, model_type):
    monkeypatch.setattr(by_layer, "AT_ONCE", 3)
    folder = saved(tmp_path / "model", model_type, "60KB")
    assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) > 3
    assert len(list(folder.glob("*.safetensors"))) >= 3
    whole = record(folder, tmp_path, passes=2, batch=2)
    layered = record(folder, tmp_path, passes=2, batch=2, layerwise=True)
    assert layered.header.details["in_memory"] == "one layer"
    assert whole.header.details["in_memory"] == "whole"
    assert whole.keys() == layered.keys()
    for key, row in whole.items():
        assert np.array_equal(row.ids, layered[key].ids)
        assert np.array_equal(row.weights, layered[key].weights)
        assert row.loss == layered[key].loss


def test_an_error_of_one_batch_ends_all(mixtral, tmp_path, monkeypatch):
    from harness.routing import calls

    monkeypatch.setattr(calls.Calls, "taken", lambda self: 1 / 0)
    refused(mixtral, tmp_path, r"cannot be run \(division by zero\)", layerwise=True)


GROWTH = """
import contextlib, sys
from pathlib import Path
import psutil
from harness.routing import by_layer
from harness.routing.huggingface import record_checkpoint

held, sizes = by_layer._held, []

@contextlib.contextmanager
def seen(layer):
    sizes.append(psutil.Process().memory_full_info().uss >> 20)
    with held(layer):
        yield

by_layer._held = seen
folder, ids, out = map(Path, sys.argv[1:])
record_checkpoint(folder, out, num_tokens=8 * 512, seq=512, token_ids=ids, layerwise=True, device="cpu")
print(*sizes)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_layers_in_bfloat16(tmp_path):
    shape = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 8, "max_position_embeddings": 512}
    made = checkpoints.model(checkpoints.config("qwen3_moe", 32, 4, **shape))
    made.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, 250, 8 * 512))
    words = [sys.executable, "-c", GROWTH, *(str(tmp_path / name) for name in ("model", "ids.npy", "t.parquet"))]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    sizes = list(map(int, done.stdout.split()[-8:]))  # MiB, ahead of each layer
    assert sizes[-1] - sizes[1] < 32, sizes
