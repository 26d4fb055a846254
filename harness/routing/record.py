"""Train a small MoE language model on real text and keep its routing at chosen steps: ``moebench record``."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness.errors import bad
from harness.layer import gates, stored
from harness.layer.experts import Experts, SharedExpert
from harness.layer.gpt import GPT
from harness.layer.weights import Weights
from harness.routing.corpus import Corpus, python_corpus
from harness.routing.trace import Header, Recorded, check_writable, write_trace
from harness.routing.types import Routing
from harness.specs import EXPERTS_CHOOSE, Model

WARMUP_STEPS = 40
EVALUATION_WINDOWS = 32  # sequences of one forward pass over the recorded tokens


class LocalMoE(nn.Module):
    """A dropless MoE layer on one device that remembers what its router chose."""

    def __init__(self, model: Model, layer: int, seed: int):
        super().__init__()
        weights = Weights(model, "float32", seed, layer)
        self.model = model
        self.gate = nn.ParameterDict(weights.gate(1))
        self.bias: torch.Tensor
        self.register_buffer("bias", weights.bias)
        self.experts = Experts(weights, range(model.num_experts))
        self.shared = SharedExpert(weights) if model.num_shared_experts else None
        self.ids = torch.empty(0)  # int64 [T, k] of the last call
        self.weights = torch.empty(0)  # [T, k]
        self.balance_loss = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, M] -> [T, M]."""
        top_k, num_experts = self.model.top_k, self.model.num_experts
        logits = gates.logits(self.model, x, self.gate)
        ids, weights = gates.route(self.model, logits, self.bias)
        order = ids.flatten().argsort(stable=True)  # assignments by expert
        counts = torch.bincount(ids.flatten(), minlength=num_experts)
        rows = self.experts(x.index_select(0, order // top_k), counts)
        rows = rows.index_select(0, order.argsort()).unflatten(0, (-1, top_k))  # [T, k, M]
        self.ids, self.weights = ids, weights.detach()
        # Switch Transformer, eq. 4: E * sum_e (share of assignments) * (mean probability); 1 when balanced
        self.balance_loss = num_experts * (counts / ids.numel()) @ logits.softmax(-1).mean(0)
        y = (rows * weights.unsqueeze(-1)).sum(1)
        return y if self.shared is None else y + self.shared(x)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What ``record`` tells its caller after every step."""

    step: int
    num_steps: int
    loss: float  # of the training batch, nats per byte
    recorded: int  # steps recorded so far


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a recording made."""

    path: Path
    num_bytes: int
    num_tokens: int
    #: by recorded step: held-out loss in nats per byte
    loss: dict[int, float]
    #: by recorded step: of every layer, max/mean load over experts
    max_over_mean: dict[int, list[float]]
    #: by recorded step: of every layer, the routing's digest
    digests: dict[int, list[str]]
    time_s: float


def default_steps(num_steps: int) -> tuple[int, ...]:
    """Early to late: 2 %, 10 %, 40 % and 100 % of training."""
    return tuple(sorted({max(1, num_steps * percent // 100) for percent in (2, 10, 40, 100)}))


def steps_of(words: Sequence[str], num_steps: int) -> tuple[int, ...]:
    """Steps by their numbers, and by spans of them. ``UserError`` for what is neither, or beyond ``num_steps``.

    >>> steps_of(["12", "20-23"], 600)
    (12, 20, 21, 22, 23)
    """
    found: set[int] = set()
    for word in words:
        span = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word, re.ASCII)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if not first <= last <= num_steps:
            raise bad("--at", word, f"must be a step of 0 to {num_steps}, or a span of them such as 20-83")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


def record(
    model: Model,
    out: Path,
    *,
    num_steps: int = 600,
    steps: Sequence[int] | None = None,
    num_tokens: int = 16384,
    batch: int = 16,
    learning_rate: float = 1e-3,
    balance: float = 3e-3,
    seed: int = 0,
    num_threads: int = 1,
    command: str = "",
    corpus: Corpus | None = None,
    gate_weights: bool = True,
    weights: Path | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Train ``model`` over bytes for ``num_steps`` steps of ``batch`` sequences and write its routing to ``out``.

    ``steps``: after how many optimizer steps to record (default: ``default_steps``; 0 is the untrained model);
    each records every layer over the same ``num_tokens`` held-out tokens. ``balance``: weight of the Switch
    load-balancing loss, by default 0.003: milder than the 0.01 of Switch Transformer and OLMoE; with the
    0.001 of Mixtral's configuration a trial had every token on the same experts after 40 steps. The same seed, number
    of threads, machine type and Python give the same trace. Without
    ``gate_weights``, more than half of a file, it holds the choices alone, which are all that a workload takes.

    Errors (``UserError``): steps out of range, a vocabulary below 256, tokens that do not fill whole sequences,
    a file that cannot be written.
    """
    steps = tuple(default_steps(num_steps)) if steps is None else tuple(sorted(set(steps)))
    if not steps or steps[0] < 0 or steps[-1] > num_steps:
        raise bad("record.steps", list(steps), f"must lie in 0..{num_steps} and not be empty")
    if not 0 <= balance < float("inf"):
        raise bad("--balance", balance, "must be a number from 0 on")
    if model.gate in EXPERTS_CHOOSE:
        raise bad("model.gate", model.gate, "has no k experts per token to record; use a gate in which tokens choose")
    if model.gate_noise:
        raise bad("model.gate_noise", True, "a routing with noise is not the model's; record without it")
    if model.lacks:
        raise bad("model", model.name, model.lacks)
    if model.vocab < 256:
        raise bad("model.vocab", model.vocab, "must be at least 256: the text is read as bytes")
    if num_tokens < model.seq or num_tokens % model.seq:
        raise bad("--tokens", num_tokens, f"must be a multiple of the model's seq = {model.seq}")
    check_writable(out)
    if weights is not None:
        if weights.absolute() == out.absolute():
            raise bad("--weights", str(weights), "is the same file as --out; name another one")
        stored.check_out(weights)
    started = time.perf_counter()
    corpus = corpus or python_corpus()
    held = torch.from_numpy(corpus.held_windows(num_tokens // model.seq, model.seq + 1))
    rows: list[Recorded] = []
    with _threads(num_threads):
        gpt = GPT(model, lambda layer: LocalMoE(model, layer, seed), seed=seed)
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
        rng = np.random.default_rng(seed)
        for step in range(num_steps + 1):
            if step in steps:
                rows += _routing_of(gpt, held, step)
            if step == max(steps):
                break  # nothing more to record
            loss = gpt.loss(torch.from_numpy(corpus.sample(rng, batch, model.seq + 1)))
            auxiliary = torch.stack([moe.balance_loss for moe in _moes(gpt)]).sum()
            optimizer.zero_grad(set_to_none=True)
            (loss + balance * auxiliary).backward()
            nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(Progress(step + 1, num_steps, float(loss.detach()), sum(s <= step for s in steps)))
    if weights is not None:
        stored.save(weights, gpt)
    header = Header(
        model=model.name,
        num_experts=model.num_experts,
        top_k=model.top_k,
        num_layers=model.num_moe_layers,
        corpus=corpus.description,
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weight_scale=max(1.0, *(float(row.weights.max()) for row in rows)),
        details={
            **{"num_steps": num_steps, "batch": batch, "learning_rate": learning_rate, "balance": balance},
            **{"seed": seed, "num_threads": num_threads, "torch": torch.__version__, "machine": platform.machine()},
            "model": model.model_dump_json(exclude={"source", "interpretation"}),
        },
    )
    write_trace(out, header, rows if gate_weights else without_weights(rows))
    return summarise(out, rows, model.num_experts, time.perf_counter() - started)


def _rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    done = min(1.0, step / num_steps)
    return min(1.0, (step + 1) / min(WARMUP_STEPS, num_steps)) * (0.55 + 0.45 * float(np.cos(np.pi * done)))


def _moes(gpt: GPT) -> list[LocalMoE]:
    return [layer for layer in gpt.moe_layers if isinstance(layer, LocalMoE)]


@torch.no_grad()
def _routing_of(gpt: GPT, held: torch.Tensor, step: int) -> list[Recorded]:
    """Every layer's routing over ``held`` [N, seq + 1]; the last byte of a window is only predicted."""
    losses, ids, weights = [], [], []
    for part in held.split(EVALUATION_WINDOWS):
        losses.append(float(gpt.loss(part)) * len(part))
        ids.append(torch.stack([moe.ids for moe in _moes(gpt)]))  # [layers, T, k]
        weights.append(torch.stack([moe.weights for moe in _moes(gpt)]))
    loss = sum(losses) / len(held)
    pairs = zip(torch.cat(ids, 1).numpy(), torch.cat(weights, 1).numpy(), strict=True)
    return [Recorded(step, layer, i.astype(np.int32), w, loss) for layer, (i, w) in enumerate(pairs)]


def without_weights(rows: Sequence[Recorded]) -> list[Recorded]:
    return [dataclasses.replace(row, weights=row.weights[:0]) for row in rows]


def summarise(path: Path, rows: list[Recorded], num_experts: int, time_s: float) -> Summary:
    """Measure what was recorded and written."""
    skew: dict[int, list[float]] = {}
    digests: dict[int, list[str]] = {}
    for row in rows:
        load = np.bincount(row.ids.ravel(), minlength=num_experts)
        skew.setdefault(row.step, []).append(float(load.max() / load.mean()))
        digests.setdefault(row.step, []).append(Routing(row.ids, (len(row.ids),), num_experts).digest)
    loss = {row.step: row.loss for row in rows}
    return Summary(path, path.stat().st_size, len(rows[0].ids), loss, skew, digests, time_s)


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Sums depend on the number of threads, so it is part of what makes a trace."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
