"""Tiny random models of every MoE class that the installed transformers has."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

HIDDEN, LAYERS = 32, 2
#: where a configuration has such a field, it gets this value
FIELDS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"), 16),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 64),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "decoder_sparse_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), 1),
    **{
        "vocab_size": 256,
        "mamba_n_heads": 4,
        "zero_expert_num": 0,
        "topk_method": "group_limited_greedy",
        "mlp_only_layers": [],
    },
}
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
#: by model type: what the class needs besides
OWN: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8, "kv_n_heads": 4}},
    "hunyuan_v1_moe": {"rope_scaling": {"rope_type": "default"}},
    "beam": {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 256, "enable_moe_block": True},
    "mimo_v2_flash": {"layer_types": ["full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["attention", "moe", "moe"]},
}


def classes() -> dict[str, str]:
    """Model type to class, of all whose code speaks of experts."""
    found: dict[str, str] = {}
    for model_type, names in NAMES.items():
        name = names if isinstance(names, str) else names[0]
        source = inspect.getsource(importlib.import_module(getattr(transformers, name).__module__))
        nested = "text_config" in transformers.CONFIG_MAPPING[model_type].sub_configs
        if "xperts" in source and name not in found.values() and not nested:
            found[model_type] = name
    return found


def config(model_type: str, num_experts: int, top_k: int, **fields: Any) -> Any:
    like = transformers.CONFIG_MAPPING[model_type]()
    groups = {"n_group": 2, "num_expert_group": 2, "topk_group": 1 if top_k <= num_experts // 2 else 2}
    values = FIELDS | dict.fromkeys(NUM_EXPERTS, num_experts) | dict.fromkeys(TOP_K, top_k) | groups
    own = {name: value for name, value in values.items() if name in like.to_dict()}
    inner = {"ffn_config": {name: values[name] for name in ("moe_num_experts", "moe_top_k", "ffn_hidden_size")}}
    own |= {name: [1] * LAYERS for name in ("moe_layer_freq",) if isinstance(getattr(like, name, None), list)}
    given = own | (inner if hasattr(like, "ffn_config") else {}) | OWN.get(model_type, {}) | fields
    return transformers.AutoConfig.for_model(model_type, **given)


def model(made: Any, seed: int = 0, shared: bool = True) -> Any:
    """Random weights and correction biases, in float32. Without ``shared``: experts of all tokens add nothing."""
    torch.manual_seed(seed)
    found = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in [*found.named_parameters(), *found.named_buffers()]:
            if "tid2eid" in name:  # experts by token id
                value.copy_(torch.rand(len(value), made.num_local_experts).argsort(-1)[:, : value.shape[1]])
            elif "correction_bias" in name or "expert_bias" in name:
                value.copy_(torch.rand_like(value))
            elif value.ndim > 1 and value.is_floating_point():
                value.normal_(0, 0.0 if "shared" in name and not shared else 0.2)
    return found


@torch.no_grad()
def weighed(made: Any, ids: torch.Tensor, chosen: list[Any]) -> list[float]:
    """For every MoE layer that ``made`` calls: how far what it makes of its tokens is from the sum of its experts'
    outputs, each expert asked alone, by the ``chosen`` ids and weights; over the largest value."""
    far: list[float] = []
    hooks = []
    for module in made.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, torch.nn.ModuleList):
            hooks.append(
                module.register_forward_hook(lambda m, a, y: far.append(_far(m.experts, a[0], y, chosen[len(far)])))
            )
        elif type(module).__name__ == "Llama4TextMoe":
            hooks.append(module.register_forward_hook(lambda m, a, y: far.append(_llama(m, a[0], y, chosen[len(far)]))))
        elif hasattr(module, "output_linear") and hasattr(module, "router"):
            hooks.append(
                module.register_forward_hook(lambda m, a, y: far.append(_linears(m, a[0], y, chosen[len(far)])))
            )
        elif hasattr(experts, "fc1") and hasattr(experts, "fc2") and "tokens_per_expert" in _fields(experts.fc1):
            hooks.append(module.register_forward_hook(lambda m, a, y: far.append(_aria(m, a[0], y, chosen[len(far)]))))
        elif isinstance(experts, torch.nn.Module) and len(_fields(experts)) > 3:
            hooks.append(
                experts.register_forward_hook(
                    lambda m, a, kw, y: far.append(_told(m, [*a, *kw.values()], y, chosen[len(far)])), with_kwargs=True
                )
            )
    made(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return far


def _sum(outputs: list[torch.Tensor], y: Any, chosen: Any) -> float:
    """``outputs``: of every expert for every token, [T, hidden]."""
    y = (y[0] if isinstance(y, tuple) else y).reshape(-1, outputs[0].shape[-1])
    rows = torch.stack(outputs, 1)  # [T, E, hidden]
    picked = rows.gather(1, chosen.ids.long()[..., None].expand(-1, -1, rows.shape[-1]))
    return float(((picked * chosen.weights[..., None]).sum(1) - y).abs().max() / y.abs().max())


def _far(experts: Any, x: torch.Tensor, y: Any, chosen: Any) -> float:
    return _sum([expert.forward(x.reshape(-1, x.shape[-1])) for expert in experts], y, chosen)


def _told(experts: Any, given: list[torch.Tensor], y: torch.Tensor, chosen: Any) -> float:
    x = given[0].reshape(-1, given[0].shape[-1])
    outputs = []
    for expert in range(chosen.num_experts):
        one = torch.full((len(x), 1), expert)
        weights = [v.reshape(-1, v.shape[-1]) for v in given[1:] if v.is_floating_point()]
        wide = len(weights) > 1 or weights[0].shape[-1] != chosen.ids.shape[-1]  # weights of all experts
        wide = wide or (type(experts).__name__ == "GptOssExperts" and transformers.__version__ < "5")
        ones = torch.ones(len(x), chosen.num_experts if wide else 1)
        full = [one if not v.is_floating_point() else ones for v in given[1:]]
        outputs.append(experts.forward(x if given[0].ndim == 2 else x[None], *full).reshape(x.shape))
    return _sum(outputs, y, chosen)


def _llama(layer: Any, x: torch.Tensor, y: Any, chosen: Any) -> float:
    x = x.reshape(-1, x.shape[-1])
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
    scores = torch.zeros(len(x), chosen.num_experts).scatter(1, chosen.ids.long(), chosen.weights)
    rows = layer.experts.forward((x[None] * scores.T[..., None]).reshape(-1, x.shape[-1]))
    return float((rows.view(chosen.num_experts, *x.shape).sum(0) - y).abs().max() / y.abs().max())


def _linears(layer: Any, x: torch.Tensor, y: Any, chosen: Any) -> float:
    x = x.reshape(-1, x.shape[-1])
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape) - getattr(layer, "bias", 0)
    outputs = []
    for inner, outer in zip(layer.input_linear.weight, layer.output_linear.weight, strict=True):
        gate, up = (x @ inner.T).chunk(2, -1)
        outputs.append((layer.activation(gate) * up) @ outer.T)
    return _sum(outputs, y, chosen)


def _aria(layer: Any, x: torch.Tensor, y: Any, chosen: Any) -> float:
    x = x.reshape(-1, x.shape[-1])
    outputs = []
    for inner, outer in zip(layer.experts.fc1.weight, layer.experts.fc2.weight, strict=True):
        up, gate = (x @ inner).chunk(2, -1)
        outputs.append((torch.nn.functional.silu(up) * gate) @ outer)
    return _sum(outputs, y, chosen)


def _fields(module: Any) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)
