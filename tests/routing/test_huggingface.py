from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from harness.errors import UserError
from harness.routing.corpus import Corpus
from harness.routing.huggingface import record_checkpoint
from harness.routing.trace import read_trace

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = np.frombuffer(b"A mixture of experts routes every token to a few of them. " * 20, np.uint8)
CORPUS = Corpus(TEXT, TEXT, "one sentence")

COMMON = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8} | {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
# class -> its own fields, number of MoE layers
CLASSES = {
    "Mixtral": ({"num_local_experts": 8}, 3),
    "Qwen3Moe": ({"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}, 3),
    "Olmoe": ({"num_experts": 8}, 3),
    "DeepseekV2": (LATENT | {"topk_method": "group_limited_greedy"}, 2),
    "DeepseekV3": (LATENT | {"routed_scaling_factor": 2.5}, 2),
}


def _model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def checkpoint(request, tmp_path):
    name = request.param
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers ({transformers.__version__}) has no {name}ForCausalLM")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(COMMON | CLASSES[name][0]))
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / "model")
    return name, tmp_path / "model"


@pytest.mark.parametrize("checkpoint", CLASSES, indirect=True)
def test_records_what_the_model_chose(checkpoint, tmp_path):
    name, folder = checkpoint
    out = tmp_path / "t.parquet"
    summary = record_checkpoint(folder, out, num_tokens=256, corpus=CORPUS, command="moebench record", device="cpu")
    trace = read_trace(out)
    num_layers = CLASSES[name][1]
    assert (trace.header.num_experts, trace.header.top_k, trace.layers) == (8, 2, list(range(num_layers)))
    assert "as bytes" in trace.header.corpus
    assert 5 < summary.loss[0] < 6  # knows nothing: log 256 = 5.5
    assert len(summary.digests[0]) == num_layers
    assert len(set(summary.digests[0])) == num_layers

    # the first MoE layer's choice, from the router's input and weight and no code of the model's router
    model = _model(folder)
    seen = {}
    gate = next(module for path, module in model.named_modules() if path.endswith((".gate", ".router")))
    gate.register_forward_pre_hook(lambda _, inputs: seen.setdefault("x", inputs[0]))
    with torch.no_grad():
        model(torch.tensor(TEXT[:64].astype(np.int64))[None])
    x = seen["x"].reshape(-1, 32).float()
    logits = x @ gate.weight.detach().float().T
    if name == "DeepseekV3":
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1)
    if name.startswith("Deepseek"):  # best 2 of 4 groups of 2: by their sum (V3) or their best (V2)
        groups = scores.view(-1, 4, 2)
        strength = groups.sum(-1) if name == "DeepseekV3" else groups.amax(-1)
        allowed = torch.zeros_like(strength).scatter(1, strength.topk(2).indices, 1).repeat_interleave(2, 1)
        scores = scores * allowed
    weights, ids = scores.topk(2)
    if name in ("Mixtral", "Qwen3Moe", "DeepseekV3"):
        weights = weights / weights.sum(-1, keepdim=True)
    if name == "DeepseekV3":
        weights = weights * 2.5
    row = trace[0, 0]
    assert np.array_equal(row.ids[:64], ids.numpy())
    assert np.abs(row.weights[:64] - weights.numpy()).max() <= trace.header.weight_scale / 255
    assert (row.weights[:, 0] >= row.weights[:, 1]).all()


@pytest.mark.parametrize("checkpoint", ["DeepseekV2"], indirect=True)
def test_a_class_whose_own_code_fails_is_refused_with_the_reason(checkpoint, tmp_path, monkeypatch):
    """As DeepSeek-V2 of transformers 5.0 does."""
    name, folder = checkpoint

    def fail(*args, **kwargs):
        raise AttributeError("'DeepseekV2Moe' object has no attribute 'num_group'")

    (moe,) = {type(m) for m in _model(folder).modules() if type(m).__name__ == "DeepseekV2Moe"}
    monkeypatch.setattr(moe, "forward", fail)
    said = (
        rf"{name}ForCausalLM of transformers {transformers.__version__} cannot be run \(.* no attribute 'num_group'\)"
    )
    with pytest.raises(UserError, match=f"{said}; try another version of transformers") as error:
        record_checkpoint(folder, tmp_path / "t.parquet", num_tokens=64, corpus=CORPUS, device="cpu")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize("checkpoint", ["Mixtral"], indirect=True)
def test_pickled_weights_are_not_loaded(checkpoint, tmp_path):
    _, folder = checkpoint
    (folder / "model.safetensors").unlink()
    torch.save(nn.Linear(2, 2).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"safetensors weights"):
        record_checkpoint(folder, tmp_path / "t.parquet", num_tokens=64, corpus=CORPUS)


def test_folders_that_hold_no_moe_model(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        record_checkpoint(tmp_path, tmp_path / "t.parquet")
    fields = {key: value for key, value in COMMON.items() if key != "num_experts_per_tok"}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="no MoE experts"):
        record_checkpoint(tmp_path / "dense", tmp_path / "t.parquet", num_tokens=64, corpus=CORPUS)
    assert not (tmp_path / "t.parquet").exists()


def test_without_transformers_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install"):
        record_checkpoint(tmp_path, tmp_path / "t.parquet")
