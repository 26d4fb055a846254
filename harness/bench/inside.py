"""A witness inside a whole model: one MoE layer of every step or pass, by what went in and what came out of it there.

References to the layer's tensors are kept while the clock runs, no more; what is wrong is worked out when it stands.
The first call is compared whole, later ones in a seeded sample: of each rank the first token, the last and others, of
the job a token of the fullest expert, and the weights of that expert and another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from harness.bench.choices import Gates
from harness.bench.conserved import least_of
from harness.bench.witness import Given, Verdict, compare, first_of, see, settled
from harness.bench.wording import allowed
from harness.comm.agree import of_all
from harness.comm.handover import Held
from harness.comm.job import Job
from harness.dtypes import SHORT, roughest
from harness.layer.grouped import Lens, Matrices, identities, look, look_shared
from harness.layer.rounding import rounded
from harness.layer.weights import Weights, shared_names
from harness.layer.work import expert_parameters
from harness.system import Case, Gradients, MoELayer, System

SAMPLED_TOKENS = 6  # of each rank, beside the first and the last
SAMPLED_EXPERTS = 1  # beside the fullest
#: numbers of weights that a rank draws once more to compare them with those that a training begins with
DRAWN = 4_000_000
#: a gradient of which a step of Adam must be seen: that divides it by its own size and 1e-8
LEAST_GRADIENT = 1e-6
_WATCHED = 3
#: a layer leaves what it is given and what it has handed on as they are, or nobody can tell what it made of what
_WRITTEN = {"x": "its input was written to", "y": "its output was written to after it was handed on"}


def watched_layers(num_layers: int) -> list[int]:
    """All, in the order in which they take turns: the first, one in the middle, the last, then the others."""
    ahead = _ahead(num_layers)
    return ahead + [layer for layer in range(num_layers) if layer not in ahead]


def turn(num_layers: int, call: int, at_once: int) -> list[int]:
    """Layers that are seen in a call, the first of them wholly, the others in a sample."""
    layers = watched_layers(num_layers)
    return [layers[(call * at_once + i) % num_layers] for i in range(at_once)]


def at_once(num_layers: int, num_calls: int | None) -> int:
    """How many layers a call must look at so that all have had their turn after ``num_calls``; None: one."""
    return 1 if num_calls is None else -(-num_layers // max(1, min(num_layers, num_calls)))


def _ahead(num_layers: int) -> list[int]:
    return sorted({round(i * (num_layers - 1) / (_WATCHED - 1)) for i in range(_WATCHED)})


@dataclasses.dataclass
class Known:
    """Weights of a layer ahead of a call: of the gate and the shared experts by name, and of the experts that each rank
    knows."""

    gate: dict[str, torch.Tensor]
    matrices: Callable[[int], Matrices]
    owner: np.ndarray  # [E]


class LayerWitness:
    """Of one layer of a model. ``natural``: its gate chooses for itself."""

    def __init__(self, job: Job, system: type[System], case: Case, weights: Weights, *, natural: bool, layer: int):
        self.job, self.system, self.case, self.layer = job, system, case, layer
        self.weights, self.natural = weights, natural
        self.identity = case.stand_in_costs is not None
        work = torch.float32 if case.dtype in SHORT else torch.float64
        self.lens = Lens.draw(case.model, weights.gate(max(case.routing.tokens)), work, job.device)
        self.gates = Gates(job, system, case, weights)
        self.calls = 0
        self.least: np.ndarray | None = None  # rows that each rank must receive in the last call, where they are known
        self.owner: np.ndarray | None = None  # [E]

    def read(self, layer: MoELayer, moves: bool) -> Known:
        """Collective: as the system's layer has them now, copied. ``moves``: experts may have changed places."""
        now = parameters_of(layer)
        own = {e: {name: value.detach().clone() for name, value in of.items()} for e, of in now.experts.items()}
        if self.owner is None or moves:
            self.owner = np.zeros(self.case.model.num_experts, dtype=np.int64)
            for rank, experts in reversed(list(enumerate(of_all(self.job, list(own))))):
                self.owner[experts] = rank
        gate = {name: value.detach().clone() for name, value in now.gate.items()}
        return Known(gate, own.__getitem__, self.owner.copy())

    def check(
        self,
        name: str,
        step: int,
        known: Known,
        held: Held,
        gradients: Gradients | None = None,
        *,
        whole: bool = True,
    ) -> Verdict:
        """Collective: ``held`` has x and y [T, M], and dy and dx if there was a backward; they are taken. ``whole``:
        all of it if it is the first call, else a sample."""
        layer = self.layer
        seen_as = {each: held.pop((layer, each)) for each in ("x", "y", "dy", "dx") if (layer, each) in held}
        x, y, dy, dx = (seen_as[each].tensor if each in seen_as else None for each in ("x", "y", "dy", "dx"))
        written = [words for each, words in _WRITTEN.items() if each in seen_as and seen_as[each].written]
        where = f"at {name}, layer {self.layer}"
        changed = Verdict({}, first_of(self.job, f"{written[0]} {where}" if written else ""))
        assert x is not None
        assert y is not None
        x, first = x.detach(), self.calls == 0
        self.calls += 1
        if self.case.model.gate == "softmoe":  # whose truth is known by the drawn weights alone
            if not first or known.gate:
                return Verdict()
            given = Given(x, None, None if dy is None else dy.detach())
        else:
            given = self._given(x, dy, known, step, whole=first and whole)
        if dy is not None and dx is None:
            dx = torch.zeros_like(x)
        if changed.reason:
            return changed
        seen = see(self.lens, name, y, dx, gradients if dy is not None else None)
        if self.job.num_ranks > 1:  # a training step has summed them over ranks
            seen.gate = {each: value / self.job.num_ranks for each, value in seen.gate.items()}
        return compare(
            self.gates,
            self.lens,
            [(seen, lambda: given)],
            allowed(self.system, roughest(self.case.dtype, self.case.exchange_dtype)),
            natural=self.natural,
            identity=self.identity,
            where=f", layer {self.layer}",
        )

    def _given(self, x: torch.Tensor, dy: torch.Tensor | None, known: Known, step: int, whole: bool) -> Given:
        gates = self.gates
        gates.oracle.step = step
        with torch.no_grad():
            for name in gates.parameters().keys() & known.gate.keys():
                gates.parameters()[name].copy_(known.gate[name])
        chosen = gates.chosen(x.double())
        if self.natural:
            sure = ~gates.unsure(gates.oracle.logits(x.double())).any(1)
            self.least = least_of(self.job, self.system, self.case, chosen[sure])
        tokens = experts = None
        if not whole:
            tokens, experts = self._sample(chosen)
            wanted = torch.zeros_like(chosen)
            wanted[tokens], wanted[:, experts] = True, True
            chosen &= wanted
        token, expert = chosen.nonzero(as_tuple=True)
        dy = None if dy is None else dy.detach()
        sent = rounded(x, self.case.exchange_dtype)
        if self.identity:
            pairs = identities(token, expert, sent, dy, self.lens)
        else:
            model, drawn = self.case.model, self.weights
            pairs = look(self.job, model, token, expert, sent, dy, known.owner, known.matrices, self.lens)
            if model.num_shared_experts:
                names = shared_names(model)
                told = {of: known.gate[name] for name, of in names.items() if name in known.gate}
                matrices = told or drawn.expert(model.num_experts)
                pairs = dataclasses.replace(pairs, shared=look_shared(model, x, dy, matrices, self.lens))
        return Given(x, pairs, tokens=tokens, experts=experts)

    def _sample(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Collective: tokens of this rank, and experts, int64 each."""
        count = chosen.sum(0)
        if self.job.num_ranks > 1:
            dist.all_reduce(count)
        fullest, num_tokens = int(count.argmax()), len(chosen)
        rng = np.random.default_rng([self.calls, self.layer])
        experts = {fullest, *rng.choice(len(count), min(SAMPLED_EXPERTS, len(count)), replace=False).tolist()}
        rng = np.random.default_rng([self.calls, self.layer, self.job.rank])
        tokens = set(rng.choice(num_tokens, min(SAMPLED_TOKENS, num_tokens), replace=False).tolist())
        if num_tokens:
            tokens |= {0, num_tokens - 1}
            there = chosen[:, fullest].nonzero()[:, 0].tolist()
            tokens |= set(there[-1:])
        device = chosen.device
        return (torch.tensor(sorted(each), dtype=torch.int64, device=device) for each in (tokens, experts))  # type: ignore[return-value]


class Witnesses(dict[int, LayerWitness]):
    """Of a model's layers: of those whose turn comes first for good, of the others the last, as many as are seen at
    once."""

    def __init__(self, num_layers: int, make: Callable[[int], LayerWitness], at_once: int = 1):
        super().__init__()
        self.ahead, self.make, self.at_once = _ahead(num_layers), make, at_once

    def __missing__(self, layer: int) -> LayerWitness:
        others = [each for each in self if each not in self.ahead]
        for other in others[: len(others) + 1 - self.at_once]:
            del self[other]
        self[layer] = self.make(layer)
        return self[layer]


def check_drawn(
    job: Job, layers: Sequence[MoELayer], weights_of: Callable[[int], Weights], tolerance: float
) -> Verdict:
    """Collective, ahead of any step: experts of every layer against those that were drawn, as many as ``DRAWN`` allows
    and one of each layer at least."""
    worst: tuple[float, str] = (0.0, "")
    model = weights_of(0).model
    at_most = max(1, DRAWN // (len(layers) * expert_parameters(model)))
    for layer, each in enumerate(layers):
        own = parameters_of(each).experts
        rng = np.random.default_rng([layer, job.rank])
        for e in rng.choice(list(own), min(at_most, len(own)), replace=False).tolist() if own else ():
            drawn = weights_of(layer).expert(e)
            for name, found in own[e].items():
                wanted = drawn[name].to(found.device).double()
                error = float((found.double() - wanted).abs().max() / wanted.abs().max())
                if not error <= max(tolerance, worst[0]):
                    text = f"weights {name} of expert {e} of layer {layer} on rank {job.rank} begin {error:.3e} off"
                    worst = error, f"{text}, allowed {tolerance:.3e}"
    return settled(job, worst)


def check_updated(
    job: Job, layer: MoELayer, known: Known, gradients: Gradients, where: str, scale: float = 1.0
) -> Verdict:
    """Collective, after a step: of each expert that is still here, what has a gradient is no longer what it was.
    ``scale``: what gradients are multiplied by."""
    now, still = parameters_of(layer).experts, (0.0, "")
    for e, of in gradients.experts.items():
        before = known.matrices(e) if e in now else {}
        for name in before:
            largest = float(of[name].abs().max())
            if largest > max(LEAST_GRADIENT * scale, still[0]) and torch.equal(now[e][name], before[name]):
                still = largest, f"{name} of expert {e} on rank {job.rank} has a gradient and no update at {where}"
    return settled(job, still)


def parameters_of(layer: MoELayer, of: Callable[[nn.Parameter], torch.Tensor] = torch.Tensor.detach) -> Gradients:
    """Weights in the oracle's layout: what ``gradients`` makes of them, as it maps each parameter's gradient there.
    ``of``: something else that is as large as a parameter."""
    parameters = list(layer.parameters())
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad, parameter.grad_dtype = None, None  # any: moments may be wider than their parameter
            parameter.grad = of(parameter)
        return layer.gradients()
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
            parameter.grad = gradient
