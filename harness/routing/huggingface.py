"""Record the routing of a Hugging Face MoE checkpoint over text: what its own routers send to its experts."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from harness.errors import UserError, bad, first_line
from harness.routing import by_layer
from harness.routing import checkpoint as checkpoints
from harness.routing.calls import Calls, Chosen, Unread
from harness.routing.corpus import Corpus
from harness.routing.record import Progress, Summary, summarise, without_weights
from harness.routing.tokens import tokens_of
from harness.routing.trace import Header, Recorded, check_writable, write_trace

LONGEST = 1024  # tokens of a sequence where no length is asked for


def record_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    num_tokens: int = 16384,
    seq: int | None = None,
    batch: int = 1,
    passes: int = 1,
    text: Path | None = None,
    token_ids: Path | None = None,
    layerwise: bool | None = None,
    gate_weights: bool = True,
    command: str = "",
    corpus: Corpus | None = None,
    device: str | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Run the model in ``checkpoint`` over ``num_tokens`` tokens ``passes`` times and write every MoE layer's routing;
    the tokens of a pass follow those of the pass before, and each pass is a step of the trace.

    ``seq``: tokens of a sequence, by default 1024 or what the model allows; ``batch``: sequences that run together.
    ``text`` or ``token_ids``: a file to read instead of ``corpus``. ``layerwise``: only one layer's weights are in
    memory at a time, with the same result (by default where the whole model has no room). Layers are counted in the
    order in which a pass calls them. Without ``gate_weights``
    only choices are kept. ``progress`` hears of forward passes as steps.

    Errors (``UserError``, nothing is written): transformers missing, a folder that holds no whole MoE model, a class
    whose experts cannot be read for certain, tokens that do not fill sequences, too little text, no numbers.
    """
    check_writable(out)
    started = time.perf_counter()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    library = checkpoints.transformers()
    if not (checkpoint / "config.json").is_file():
        raise bad("checkpoint", str(checkpoint), "is not a folder with a config.json; give a downloaded checkpoint")
    if layerwise is None:
        layerwise = not checkpoints.fits(checkpoint, device)
    with tempfile.TemporaryDirectory(prefix="moebench-layers-") as folder:
        if layerwise:
            model = by_layer.load(checkpoint, Path(folder), device)
        else:
            model = checkpoints.load(checkpoint).to(device)
        seq = _length(model, seq, num_tokens)
        vocab = model.config.get_text_config().vocab_size
        tokens, what = tokens_of(checkpoint, passes * num_tokens, vocab, text=text, ids=token_ids, corpus=corpus)
        batches = [part for step in tokens.view(passes, -1, seq) for part in step.split(batch)]  # [<= batch, seq]
        ran = _run(model, checkpoint, batches, device, layerwise, progress)
    each = len(ran) // passes
    rows = [
        row
        for step in range(passes)
        for row in _rows(step, ran[step * each : (step + 1) * each], num_tokens, checkpoint)
    ]
    first = ran[0][1][0]
    header = Header(
        model=str(model.config.model_type),
        num_experts=first.num_experts,
        top_k=rows[0].ids.shape[1],
        num_layers=len(rows) // passes,
        corpus=what,
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weight_scale=max(1.0, *(float(row.weights.max()) for row in rows)),
        details={
            **{"checkpoint": checkpoint.resolve().name, "seq": seq, "batch": batch, "read": first.how},
            "in_memory": "one layer" if layerwise else "whole",
            **{"transformers": library.__version__, "torch": torch.__version__, "device": device},
        },
    )
    write_trace(out, header, rows if gate_weights else without_weights(rows))
    return summarise(out, rows, first.num_experts, time.perf_counter() - started)


def _length(model: Any, seq: int | None, num_tokens: int) -> int:
    allowed = getattr(model.config.get_text_config(), "max_position_embeddings", None) or seq or LONGEST
    seq = seq or min(LONGEST, allowed)
    if not 2 <= seq <= allowed:
        raise bad("record.seq", seq, f"must lie in 2..{allowed}, the sequences that the model is made for")
    if num_tokens % seq:
        remedy = f"must be a multiple of the sequences' {seq} tokens; give {max(1, num_tokens // seq) * seq}"
        raise bad("--tokens", num_tokens, f"{remedy}, or another --seq")
    return seq


def _run(
    model: Any,
    checkpoint: Path,
    batches: list[torch.Tensor],
    device: str,
    layerwise: bool,
    progress: Callable[[Progress], None],
) -> list[tuple[float, list[Chosen]]]:
    """Of every batch its loss and what each layer chose, on the CPU."""
    name = f"{type(model).__name__} of transformers {checkpoints.transformers().__version__}"

    def forward(index: int) -> tuple[float, list[Chosen]]:
        ids = batches[index].to(device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits  # [B, seq, vocab]
            losses = [F.cross_entropy(of[:-1].float(), right[1:]) for of, right in zip(logits, ids, strict=True)]
        taken = [Chosen(c.ids.cpu(), c.weights.cpu(), c.num_experts, c.how) for c in calls.taken()]
        wrong = [layer for layer, chosen in enumerate(taken) if not torch.isfinite(chosen.weights).all()]
        if wrong or logits.isnan().any():
            where = f"the weights of MoE layer {wrong[0]}" if wrong else "the logits"
            raise bad("checkpoint", str(checkpoint), f"{where} are no numbers (NaN); the checkpoint is damaged")
        loss = float(torch.stack(losses).mean())
        progress(Progress(index + 1, len(batches), loss, 0))
        return loss, taken

    with Calls(model) as calls:
        if not calls.hooks:
            remedy = f"{name} has no MoE experts whose calls moebench can read; give a checkpoint of another class"
            raise bad("checkpoint", str(checkpoint), remedy)
        try:
            if layerwise:
                return by_layer.run(model, len(batches), forward, checkpoint)
            return [forward(index) for index in range(len(batches))]
        except Unread as error:
            remedy = f"{name} is not recorded: {error}"
            raise bad("checkpoint", str(checkpoint), f"{remedy}; try another version, or another checkpoint") from None
        except UserError:
            raise
        except Exception as error:  # a model's own code
            reason = first_line(error)
            remedy = f"{name} cannot be run ({reason}); try another version of transformers, or a smaller --batch"
            raise bad("checkpoint", str(checkpoint), remedy) from None


def _rows(step: int, ran: list[tuple[float, list[Chosen]]], num_tokens: int, checkpoint: Path) -> list[Recorded]:
    """Every layer of one pass."""
    loss = float(np.mean([loss for loss, _ in ran]))
    if not ran[0][1] or len({len(layers) for _, layers in ran}) > 1:
        raise bad("checkpoint", str(checkpoint), "its experts are not called alike by every sequence; not supported")
    rows = []
    for layer, parts in enumerate(zip(*(layers for _, layers in ran), strict=True)):
        shapes = {(part.ids.shape[1], part.num_experts) for part in parts} | {
            (first.ids.shape[1], first.num_experts) for first in ran[0][1]
        }
        if len(shapes) > 1:
            remedy = f"its layers have different numbers of experts or experts a token: {sorted(shapes)}; not supported"
            raise bad("checkpoint", str(checkpoint), remedy)
        ids = torch.cat([part.ids for part in parts])
        weights = torch.cat([part.weights for part in parts])
        if len(ids) != num_tokens:
            text = f"MoE layer {layer} is called for {len(ids)} tokens of {num_tokens}"
            raise bad("checkpoint", str(checkpoint), f"{text}; this model class is not supported")
        rows.append(Recorded(step, layer, ids.numpy(), weights.numpy(), loss))
    return rows
