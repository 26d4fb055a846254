"""Record the routing of a Hugging Face MoE checkpoint (Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2/V3) on real text.

Local files only, no code from the checkpoint, weights from safetensors only. A router is found by its place (a module
called ``gate`` or ``router`` with a weight [E, hidden]) and read through a forward hook, so it is the model's own
choice. transformers 5 routers return (logits, weights, ids); before, some were linear layers that returned logits, and
DeepSeek's returned (ids, weights).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from harness.errors import bad
from harness.routing.corpus import Corpus, python_corpus
from harness.routing.record import Progress, Summary, summarise
from harness.routing.trace import Header, Recorded, check_writable, write_trace

ROUTER_NAMES = ("gate", "router")


def record_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    num_tokens: int = 16384,
    seq: int = 1024,
    command: str = "",
    corpus: Corpus | None = None,
    device: str | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Run the model in ``checkpoint`` over ``num_tokens`` tokens and write every MoE layer's routing as step 0.

    ``seq``: tokens of one sequence (at most what the model allows; shorter if it must divide ``num_tokens``).
    Text without a tokenizer in the folder is read as bytes. ``progress`` hears of sequences as steps.
    Errors (``UserError``): transformers missing, a folder that holds no such model, routers that cannot be read.
    """
    check_writable(out)
    started = time.perf_counter()
    corpus = corpus or python_corpus()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = _load(checkpoint).to(device).eval()
    seq = np.gcd(num_tokens, min(seq, getattr(model.config, "max_position_embeddings", seq))).item()
    tokens, how = _tokens(checkpoint, corpus, num_tokens, model.config.vocab_size)
    routers = _routers(model, checkpoint)
    top_k = int(model.config.num_experts_per_tok)
    num_experts = routers[0].weight.shape[0]

    chosen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda _, __, output, kept=kept: kept.append(chosen_by(output, top_k)))
        for router, kept in zip(routers, chosen, strict=True)
    ]
    losses = []
    try:
        with torch.inference_mode():
            for index, ids in enumerate(tokens.view(-1, 1, seq).to(device)):  # [1, seq]
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                losses.append(float(F.cross_entropy(logits, ids[0, 1:])))
                progress(Progress(index + 1, num_tokens // seq, losses[-1], 0))
    finally:
        for hook in hooks:
            hook.remove()

    rows = [
        Recorded(
            step=0,
            layer=layer,
            ids=torch.cat([ids for ids, _ in parts]).cpu().numpy(),
            weights=torch.cat([weights for _, weights in parts]).cpu().numpy(),
            loss=float(np.mean(losses)),
        )
        for layer, parts in enumerate(chosen)
    ]
    for row in rows:
        if row.ids.shape != (num_tokens, top_k):
            text = f"layer {row.layer} routed {row.ids.shape} instead of {(num_tokens, top_k)} tokens and experts"
            raise bad("checkpoint", str(checkpoint), f"{text}; this model class is not supported")
    header = Header(
        model=str(model.config.model_type),
        num_experts=num_experts,
        top_k=top_k,
        num_layers=len(routers),
        corpus=f"held-out part, {how}, of: {corpus.description}",
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weight_scale=max(1.0, *(float(row.weights.max()) for row in rows)),
        details={"checkpoint": checkpoint.resolve().name, "seq": seq, "transformers": _transformers().__version__},
    )
    write_trace(out, header, rows)
    return summarise(out, rows, num_experts, time.perf_counter() - started)


def chosen_by(output: Any, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int32 [T, k] best first and weights float32 [T, k] from whatever a router returned."""
    tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, torch.Tensor)]
    ids = next((t for t in tensors if not t.is_floating_point() and t.shape[-1] == top_k), None)
    if ids is None:  # a linear layer: logits of all experts
        weights, ids = tensors[0].float().softmax(-1).topk(top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        weights = next(t for t in tensors if t.is_floating_point() and t.shape == ids.shape).float()
    weights, order = weights.flatten(0, -2).sort(dim=-1, descending=True, stable=True)
    return ids.flatten(0, -2).gather(-1, order).int(), weights


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        remedy = "needs transformers, which is not installed: pip install 'transformers>=4.56' 'safetensors>=0.5'"
        raise bad("checkpoint", "transformers", remedy) from None
    return transformers


def _load(checkpoint: Path) -> nn.Module:
    transformers = _transformers()
    if not (checkpoint / "config.json").is_file():
        raise bad("checkpoint", str(checkpoint), "is not a folder with a config.json; give a downloaded checkpoint")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            str(checkpoint), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = f"cannot be loaded ({reason}); it needs safetensors weights of a class that transformers itself has"
        raise bad("checkpoint", str(checkpoint), remedy) from None


def _routers(model: Any, checkpoint: Path) -> list[Any]:
    """Routers in the order of their layers."""
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ROUTER_NAMES and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    if not found or getattr(model.config, "num_experts_per_tok", None) is None:
        remedy = f"a {model.config.model_type} model has no MoE router that moebench knows; give an MoE checkpoint"
        raise bad("checkpoint", str(checkpoint), remedy)
    if len({module.weight.shape[0] for module in found}) > 1:
        raise bad("checkpoint", str(checkpoint), "its layers have different numbers of experts; not supported")
    return found


def _tokens(checkpoint: Path, corpus: Corpus, num_tokens: int, vocab: int) -> tuple[torch.Tensor, str]:
    """int64 [num_tokens] and how the text was read."""
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if any((checkpoint / name).is_file() for name in files):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            str(checkpoint), local_files_only=True, trust_remote_code=False
        )
        ids = tokenizer(corpus.held.tobytes().decode(errors="replace"))["input_ids"]
        how = "tokenised by the checkpoint's tokenizer"
    elif vocab < 256:
        raise bad("checkpoint", str(checkpoint), f"has no tokenizer, and its vocabulary of {vocab} holds no bytes")
    else:
        ids, how = corpus.held.tolist(), "as bytes, because the checkpoint has no tokenizer"
    if len(ids) < num_tokens:
        raise bad("record.num_tokens", num_tokens, f"the held-out text has only {len(ids)} tokens")
    return torch.tensor(ids[:num_tokens], dtype=torch.int64), how
