"""A witness of every call: what a system made at full shape, warm-up and timed, against what it must have made.

After each call, outside the clock, the witness looks at outputs and gradients through a lens
(``harness.layer.grouped``) and keeps a few numbers a token and a weight. When the clock has stopped, it works out the
same numbers from inputs and weights alone. A system that is right must agree in every call, token, expert and weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from harness.bench.choices import Gates
from harness.bench.off import of_experts, scale_of, worst_pair, worst_token
from harness.comm.agree import of_all
from harness.comm.handover import used_here
from harness.comm.job import Job
from harness.layer.grouped import NUM_DIRECTIONS, Lens, Pairs
from harness.layer.oracle import Oracle
from harness.system import Gradients

#: the largest of a matrix' numbers, as errors are relative to it, by their root mean square: of 1e4 normal ones.
#: Measured in trainings of all 19 native systems and DeepSpeed (2 ranks, hidden 512, swiglu, k = 4, bfloat16): 2.5e-3
#: to 4.4e-3 (2e-2 allowed); of flat, hiermoe-hd2 and Megatron on four shapes up to 8.3e-3; in float32 5.6e-7 (1e-5).
#: Gradients not summed over 2 ranks 8.4e-2 and more, missing ones 2.5e-1. One that is 3 % too large is 8.1e-3 at most
#: by this scale: found in float32, not in bfloat16
LARGEST = 4.0
#: a gradient this much smaller than what it is added up from is nothing, and errors are relative to that.
#: Measured there: 1.1 to 2.3 of a gate's (1.96 to 1.97 of all those systems), so none was taken for nothing, off by
#: 1.3e-3 in bfloat16, 2.2e-7 in float32
CANCELS = 1e-3


@dataclasses.dataclass
class Verdict:
    """Largest relative errors over ranks and calls, by ``output``, ``input_grad``, ...; ``reason``: what is wrong."""

    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""

    def __add__(self, other: Verdict) -> Verdict:
        names = dict.fromkeys((*self.errors, *other.errors))
        errors = {name: max(self.errors.get(name, 0.0), other.errors.get(name, 0.0)) for name in names}
        return Verdict(errors, self.reason or other.reason)


@dataclasses.dataclass
class Seen:
    """One call through the lens, on this rank. The last column of each is how long it is: the root of its squares."""

    name: str  # of the call
    y: torch.Tensor  # [T, q + 1]
    dx: torch.Tensor | None = None  # [T, q + 1]
    experts: dict[int, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)  # [q + 1] of each matrix
    gate: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # [q], this rank's own part
    #: of an exchange whose gate stands before it: ids [T, k], and gradients of their weights [T, k], if there are any
    gate_weights: tuple[torch.Tensor, torch.Tensor | None] | None = None


@dataclasses.dataclass
class Given:
    """What one call was given, on this rank, and what is known of its pairs."""

    x: torch.Tensor  # [T, M]
    pairs: Pairs | None  # None: of a gate that mixes tokens; there ``dy`` is needed
    dy: torch.Tensor | None = None  # [T, M]
    tokens: torch.Tensor | None = None  # int64: those whose pairs are all there; None: all
    experts: torch.Tensor | None = None  # int64: the same of experts, of all ranks' tokens


def see(
    lens: Lens,
    name: str,
    y: torch.Tensor,
    dx: torch.Tensor | None = None,
    gradients: Gradients | None = None,
    gate_weights: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> Seen:
    """Of y, dx [T, M] and weight gradients; they may be gone afterwards."""
    y = _rows(y, lens.y)
    dx = None if dx is None else _rows(dx, lens.dx)
    if gradients is None:
        return Seen(name, y, dx)

    def through(matrix: str, gradient: torch.Tensor) -> torch.Tensor:
        gradient = used_here(gradient.detach())
        length = torch.linalg.vector_norm(gradient, dtype=lens.y.dtype)
        return torch.cat([lens.of_matrix(matrix, gradient), length[None]])

    experts = {e: {matrix: through(matrix, of[matrix]) for matrix in of} for e, of in gradients.experts.items()}
    gate = {n: lens.of_matrix(n, used_here(gradient.detach())) for n, gradient in gradients.gate.items()}
    return Seen(name, y, dx, experts, gate, gate_weights)


def _rows(rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    rows = used_here(rows.detach()).to(directions.dtype)
    return torch.cat([rows @ directions, torch.linalg.vector_norm(rows, dim=1, keepdim=True)], 1)


@dataclasses.dataclass
class _Wanted:
    """What one call must have made, as ``Seen``; ``sums``, still to be added over ranks: of every expert's matrices and
    of the gate's the numbers and the squared size."""

    y: torch.Tensor
    dx: torch.Tensor | None
    sure: torch.Tensor  # bool [T]
    experts: torch.Tensor  # [E, matrices, q + 1]
    doubtful: torch.Tensor  # [E]: not to be compared
    gate: torch.Tensor  # [parameters, q + 1]
    gate_terms: torch.Tensor  # squared size of what the gate's gradients are added up from; it may cancel
    names: list[str]  # of the matrices
    ids: Callable[[int], list[int]]  # experts of a token
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # token, expert, gradient of its weight: [n]


def _mixed(gates: Gates, given: Given, lens: Lens, identity: bool) -> _Wanted:
    """Soft MoE, where every token is in every expert's slots: the oracle on this rank's tokens alone."""
    oracle = Oracle(gates.weights, identity, gates.case.routing.tokens).to(given.x.device)
    oracle.tokens = gates.oracle.tokens
    x = given.x.double().requires_grad_(given.dy is not None)
    with torch.set_grad_enabled(given.dy is not None):
        y = oracle(x)
    names = [name for name in ("w1", "w2", "w3") if hasattr(oracle, name) and not identity]
    num_experts, q = gates.case.model.num_experts, NUM_DIRECTIONS
    experts = torch.zeros(num_experts, len(names), q + 1, dtype=torch.float64, device=x.device)
    gate = torch.zeros(len(gates.replicated), q + 1, dtype=torch.float64, device=x.device)
    dx = None
    if given.dy is not None:
        y.backward(given.dy.double())
        dx = torch.zeros_like(x) if x.grad is None else x.grad
        for i, name in enumerate(names):
            for e, gradient in enumerate(getattr(oracle, name).grad):
                experts[e, i, :q], experts[e, i, q] = lens.of_matrix(name, gradient), gradient.square().sum()
        for i, name in enumerate(gates.replicated):
            gradient = getattr(oracle, name).grad
            gate[i, :q], gate[i, q] = lens.of_matrix(name, gradient), gradient.square().sum()
    sure, doubtful = torch.ones(len(x), dtype=torch.bool, device=x.device), torch.zeros(num_experts, device=x.device)
    return _Wanted(
        y.detach().to(lens.y.dtype) @ lens.y,
        None if dx is None else dx.to(lens.dx.dtype) @ lens.dx,
        sure,
        experts,
        doubtful,
        gate,
        gate.new_zeros(1),
        names,
        lambda token: [],
    )


def _want(gates: Gates, given: Given, lens: Lens, *, constant_gate: bool, natural: bool) -> _Wanted:
    """Collective, where a capacity drops."""
    oracle, pairs = gates.oracle, given.pairs
    assert pairs is not None
    num_experts, work = gates.case.model.num_experts, lens.y.dtype
    x = given.x.double().requires_grad_(pairs.gate is not None and not constant_gate)
    with torch.set_grad_enabled(x.requires_grad):
        logits = oracle.logits(x)
        dense = gates.weigh(logits)
        g = dense[pairs.token, pairs.expert]
    sure, doubtful = torch.ones(len(x), dtype=torch.bool, device=x.device), torch.zeros(num_experts, device=x.device)
    if natural or gates.case.model.capacity_factor is not None:
        unsure = gates.unsure(logits)
        sure, doubtful = ~unsure.any(1), unsure.any(0).double()
    if given.tokens is not None:
        here = torch.zeros_like(sure)
        here[given.tokens] = True
        sure &= here
    weight = g.detach().to(work)[:, None]
    y = torch.zeros(len(x), NUM_DIRECTIONS, dtype=work, device=x.device).index_add(0, pairs.token, weight * pairs.y)
    if pairs.shared is not None:
        y = y.index_add(0, pairs.shared.token, pairs.shared.y)
    names = list(pairs.weights)
    experts = torch.zeros(num_experts, len(names), NUM_DIRECTIONS + 1, dtype=torch.float64, device=x.device)
    gate = torch.zeros(len(gates.replicated), NUM_DIRECTIONS + 1, dtype=torch.float64, device=x.device)
    token, expert = pairs.token, pairs.expert

    def ids(which: int) -> list[int]:
        return expert[token == which].tolist()

    if pairs.gate is None or pairs.dx is None:
        return _Wanted(y, None, sure, experts, doubtful, gate, gate.new_zeros(1), names, ids)
    dx = torch.zeros_like(y).index_add(0, pairs.token, weight * pairs.dx)
    if pairs.shared is not None and pairs.shared.dx is not None:
        dx = dx.index_add(0, pairs.shared.token, pairs.shared.dx)
        for i, name in enumerate(pairs.shared.weights, len(oracle.gate_names)):
            gate[i, :-1] = pairs.shared.weights[name].double().sum(0)
            gate[i, -1] = pairs.shared.sizes[name].double().sum()
    for i, name in enumerate(names):
        parts = torch.cat([weight * pairs.weights[name], weight.square() * pairs.sizes[name][:, None]], 1)
        experts[:, i].index_add_(0, pairs.expert, parts.double())
    terms = gate.new_zeros(1)
    if x.requires_grad:
        terms += ((weight[:, 0] * pairs.gate).double().square() * x.detach().square().sum(1)[pairs.token]).sum()
        parameters = gates.parameters()
        surrogate = (g * pairs.gate.double()).sum()
        found = torch.autograd.grad(surrogate, [x, *parameters.values()], allow_unused=True)
        if found[0] is not None:
            dx = dx + (found[0] @ lens.dx.double()).to(work)
        for i, (name, gradient) in enumerate(zip(parameters, found[1:], strict=True)):
            if gradient is not None:
                gate[i, :-1], gate[i, -1] = lens.of_matrix(name, gradient), gradient.square().sum()
    taken = sure[pairs.token] & (g.detach() > 0)
    of_pairs = pairs.token[taken], pairs.expert[taken], pairs.gate[taken].double()
    return _Wanted(y, dx, sure, experts, doubtful, gate, terms, names, ids, of_pairs)


def compare(
    gates: Gates,
    lens: Lens,
    calls: Iterable[tuple[Seen, Callable[[], Given]]],
    tolerance: float,
    *,
    constant_gate: bool = False,
    natural: bool = False,
    identity: bool = False,
    where: str = "",
    cache: dict[Any, Any] | None = None,
) -> Verdict:
    """Collective: every call of a layer against what it was given. ``constant_gate``: no gradient goes through it;
    ``natural``: it chooses for itself, so that choices may be close; ``identity``: experts return their input;
    ``where``: what the layer is, in words; ``cache``: of what systems have in common that are given the same.

    Stand-ins for experts hand on what they get, and where several share an expert, each does: there all may be some
    whole number of times as large."""
    job = gates.job
    worst: dict[str, tuple[float, str]] = {}

    def note(kind: str, error: float, text: str) -> None:
        error = math.inf if math.isnan(error) else error
        if kind not in worst or error > worst[kind][0]:
            worst[kind] = error, text

    for seen, give in calls:
        given, wanted = _known(gates, lens, give, cache, constant_gate, natural, identity)
        if gates.case.stand_in_costs is not None:
            wanted = _multiplied(job, seen, wanted)
        at = f"at {seen.name}{where}"
        for kind, found, expected in (("output", seen.y, wanted.y), ("input_grad", seen.dx, wanted.dx)):
            if found is None or expected is None:
                continue
            scale = scale_of(job, found, expected, wanted.sure)
            if bool(wanted.sure.any()):
                error, token = worst_token(found[:, :-1], expected, wanted.sure)
                note(kind, error / scale, f"of token {token}{of_experts(wanted.ids(token))} on rank {job.rank} {at}")
        if seen.gate_weights is not None and wanted.pairs is not None:
            error, token = worst_pair(wanted.pairs, *seen.gate_weights)
            note("weight_grad", error, f"of the gate's weights of token {token} on rank {job.rank} {at}")
        if wanted.dx is not None:
            for error, text in _weights(job, gates, given, seen, wanted, at):
                note("weight_grad", error, text)
    return _settle(job, worst, tolerance)


def _known(
    gates: Gates,
    lens: Lens,
    give: Callable[[], Given],
    cache: dict[Any, Any] | None,
    constant_gate: bool,
    natural: bool,
    identity: bool,
) -> tuple[Given, _Wanted]:
    """Collective, the same on all ranks: worked out, or found where another system has had the same call."""
    key = getattr(give, "args", None), constant_gate, gates.rule
    if cache is not None and key in cache:
        found: tuple[Given, _Wanted] = cache[key]
        return found
    given = give()
    if given.pairs is None:
        wanted = _mixed(gates, given, lens, identity)
    else:
        wanted = _want(gates, given, lens, constant_gate=constant_gate, natural=natural)
    if cache is not None:
        cache[key] = dataclasses.replace(given, x=given.x[:0], dy=None, pairs=None), wanted
    return given, wanted


def _multiplied(job: Job, seen: Seen, wanted: _Wanted) -> _Wanted:
    """Collective: by the whole number of times that all is larger than it would be."""
    found, expected = seen.y[wanted.sure, :-1].double().flatten(), wanted.y[wanted.sure].double().flatten()
    dots = torch.stack([found @ expected, expected @ expected])
    if job.num_ranks > 1:
        dist.all_reduce(dots, group=job.world)
    factor = max(1.0, round(float(dots[0] / dots[1].clamp_min(1e-300)))) if bool(dots.isfinite().all()) else 1.0
    gate = torch.cat([wanted.gate[:, :-1] * factor, wanted.gate[:, -1:] * factor**2], 1)
    dx = None if wanted.dx is None else wanted.dx * factor
    return dataclasses.replace(wanted, y=wanted.y * factor, dx=dx, gate=gate)


def _weights(job: Job, gates: Gates, given: Given, seen: Seen, wanted: _Wanted, at: str) -> Iterable[tuple[float, str]]:
    """Collective: errors of this rank's experts and of the gate."""
    names, gate_names = wanted.names, gates.replicated
    own = torch.zeros(len(gate_names), NUM_DIRECTIONS, dtype=torch.float64, device=job.device)
    for i, name in enumerate(gate_names):
        if name in seen.gate:
            own[i] = seen.gate[name].double()
    told = torch.zeros(gates.case.model.num_experts, dtype=torch.float64, device=job.device)
    told[list(seen.experts)] = 1
    experts, doubtful, gate, terms, own, told = _summed(
        job, wanted.experts, wanted.doubtful, wanted.gate, wanted.gate_terms, own, told
    )
    checked = set(range(len(experts)) if given.experts is None else given.experts.tolist())
    largest = experts[:, :, -1].sqrt().amax(0) if experts.numel() else experts.new_zeros(0)
    for e, of in seen.experts.items():
        for i, name in enumerate(names):
            if name not in of or e not in checked or float(doubtful[e]):
                continue
            expected, size, own_size = experts[e, i, :-1], float(experts[e, i, -1]) ** 0.5, float(of[name][-1])
            scale = LARGEST * max(size, own_size, float(expected.abs().max())) or LARGEST * float(largest[i]) or 1.0
            error = float((of[name][:-1].double().cpu() - expected).abs().max()) / scale
            yield error, f"of {name} of expert {e} on rank {job.rank} {at}"
    for e in (told == 0).nonzero()[:, 0].tolist() if names else ():
        if e in checked and float(experts[e, :, -1].sum()):
            yield math.inf, f"of expert {e}, of which no rank has a gradient, {at}"
    if given.tokens is None and not float(doubtful.sum()):
        for i, name in enumerate(gate_names):
            size, of_terms = max(float(gate[i, -1]) ** 0.5, float(gate[i, :-1].abs().max())), float(terms) ** 0.5
            scale = LARGEST * (size if size > CANCELS * of_terms else of_terms) or 1.0
            whose = "shared experts'" if name in gates.shared else "gate's"
            yield float((own[i] - gate[i, :-1]).abs().max()) / scale, f"of the {whose} {name} {at}"


def _summed(job: Job, *parts: torch.Tensor) -> list[torch.Tensor]:
    """Of all ranks, in one message, on the CPU."""
    flat = torch.cat([part.double().flatten() for part in parts])
    if job.num_ranks > 1:
        dist.all_reduce(flat, group=job.world)
    found = flat.cpu().split([part.numel() for part in parts])
    return [each.view(part.shape) for each, part in zip(found, parts, strict=True)]


def _settle(job: Job, worst: dict[str, tuple[float, str]], tolerance: float) -> Verdict:
    """Collective: what is worst on any rank."""
    every = of_all(job, worst)
    verdict, reasons = Verdict(), []
    for kind in dict.fromkeys(kind for of in every for kind in of):
        error, text = max((of[kind] for of in every if kind in of), key=lambda each: each[0])
        verdict.errors[kind] = error
        if not error <= tolerance:
            reasons.append(f"{kind} off by {error:.3e}, allowed {tolerance:.3e}, {text}")
    verdict.reason = "; ".join(reasons)
    return verdict


def settled(job: Job, worst: tuple[float, str]) -> Verdict:
    """Collective: the worst of the ranks' (how bad, in words); nothing is wrong where all are 0."""
    return Verdict({}, max(of_all(job, worst), key=lambda each: each[0])[1])


def over_groups(job: Job, verdict: Verdict) -> Verdict:
    """Collective: what every expert-parallel group has found for itself, together."""
    return sum(of_all(job, verdict), Verdict())


def first_of(job: Job, reason: str) -> str:
    """Collective: what the first rank says that has something to say."""
    return next(filter(None, of_all(job, reason)), "")
