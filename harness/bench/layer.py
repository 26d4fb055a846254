"""Phases ``exchange`` and ``layer``: one MoE layer, forward and backward, as a contender of a race."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from harness.bench.choices import Gates
from harness.bench.timing import Sample, Stopwatch
from harness.bench.untimed import Untimed, marks
from harness.bench.witness import Given, Seen, Verdict, compare, first_of, over_groups, see
from harness.bench.wording import allowed
from harness.comm.job import Job
from harness.dtypes import SHORT, roughest
from harness.layer import gates
from harness.layer.grouped import Lens, Pairs, identities, look, look_shared
from harness.layer.oracle import Oracle
from harness.layer.rounding import rounded
from harness.layer.weights import Weights
from harness.plan.graph import Timeline
from harness.routing import Routing
from harness.specs import Experiment
from harness.system import Case, MoELayer, System


class Truth:
    """What a layer is given call by call, the same for all systems of a race, and what is known of it.

    Every call has the same tokens in another order, behind another gradient: each token's share of it is multiplied by
    plus or minus a power of two, which rounds nothing. So bytes and loads stay those of the case, no call repeats the
    last one's routing, output or gradients, and the experts' part of the truth is worked out once a race."""

    def __init__(self, job: Job, experiment: Experiment, case: Case):
        self.job, self.case, self.model = job, case, case.model
        self.weights = Weights(case.model, case.dtype, seed=experiment.workload.seed)
        self.prescribed = experiment.workload.generator != "natural"
        self.backward = experiment.backward
        self.identity = (
            case.identity_experts or case.stand_in_costs is not None
        )  # stand-ins hand on what they are given
        directions = self.weights.directions.double() if self.prescribed else None
        x, dy = draw_inputs(case.routing, self.model.hidden, directions, job.rank, experiment.workload.seed)
        self.x, self.dy = x.to(case.torch_dtype), dy.to(case.torch_dtype)
        work = torch.float32 if case.dtype in SHORT else torch.float64
        gate = self.weights.gate(max(case.routing.tokens))
        self.lens = Lens.draw(self.model, gate, work, job.device)
        if self.prescribed:
            check_routing(case, Oracle(self.weights, identity_experts=True), self.x.double(), job.rank)
        self._pairs: Pairs | None = None
        self.known: dict[Any, Any] = {}  # what calls must have made, until all systems have been compared

    def order(self, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which token comes where, int64 [T], and the factor of each token's gradient, [T] by token."""
        count = len(self.x)
        generator = torch.Generator().manual_seed(1_000_003 * call + self.job.rank)
        factor = 2.0 ** torch.randint(-1, 2, (count,), generator=generator)
        factor = factor * (2 * torch.randint(0, 2, (count,), generator=generator) - 1)
        # A noisy gate's noise belongs to places, so there tokens keep theirs.
        stays = self.model.gate_noise
        return torch.arange(count) if stays else torch.randperm(count, generator=generator), factor

    def inputs(self, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and a gradient of y, [T, M] each, in the case's dtype on the device."""
        order, factor = self.order(call)
        dy = self.dy[order] * factor[order].to(self.dy.dtype)[:, None]
        return self.x[order].to(self.job.device), dy.to(self.job.device)

    def given(self, call: int) -> Given:
        """Collective the first time: of one call."""
        device = self.job.device
        if self.model.gate == "softmoe":
            x, dy = self.inputs(call)
            return Given(x, None, dy if self.backward else None)
        pairs = self.pairs()
        order, factor = (each.to(device) for each in self.order(call))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        return Given(self.x.to(device)[order], _turned(pairs, place, factor))

    def pairs(self) -> Pairs:
        """Collective the first time: of the tokens in the order in which they were drawn."""
        if self._pairs is None:
            job, model, dy = self.job, self.model, self.dy.to(self.job.device) if self.backward else None
            x = self.x.to(job.device)
            chosen = Gates(job, None, self.case, self.weights).chosen(x.double())
            token, expert = chosen.nonzero(as_tuple=True)
            sent = rounded(x, self.case.exchange_dtype)
            if self.identity:
                self._pairs = identities(token, expert, sent, dy, self.lens)
            else:
                owner = self.case.placement.owner
                found = look(job, model, token, expert, sent, dy, owner, self.weights.expert, self.lens)
                known = self.weights.expert(model.num_experts) if model.num_shared_experts else {}
                self._pairs = dataclasses.replace(found, shared=look_shared(model, x, dy, known, self.lens))
        return self._pairs


def _turned(pairs: Pairs, place: torch.Tensor, factor: torch.Tensor) -> Pairs:
    """Of tokens at other places, int64 [T], behind a gradient that is ``factor`` [T] times as large."""
    times = factor[pairs.token].to(pairs.y.dtype)
    return dataclasses.replace(
        pairs,
        token=place[pairs.token],
        gate=None if pairs.gate is None else pairs.gate * times,
        dx=None if pairs.dx is None else pairs.dx * times[:, None],
        weights={name: part * times[:, None] for name, part in pairs.weights.items()},
        sizes={name: part * times.square() for name, part in pairs.sizes.items()},
        shared=None if pairs.shared is None else _turned(pairs.shared, place, factor),
    )


class LayerContender:
    """Phases ``exchange`` and ``layer``: forward and backward of one MoE layer on inputs drawn in advance. ``shared``:
    of the race, where its contenders find the same ``Truth``."""

    def __init__(
        self,
        job: Job,
        system: type[System],
        experiment: Experiment,
        case: Case,
        shared: dict[Any, Any] | None = None,
    ):
        self.job, self.system, self.experiment, self.case = job, system, experiment, case
        shared = {} if shared is None else shared
        if "truth" not in shared:
            shared["truth"] = Truth(job, experiment, case)
        self.truth: Truth = shared["truth"]
        self.layer = system.build(case, job, Weights(case.model, case.dtype, seed=experiment.workload.seed))
        self.calls = 0
        self.seen: list[tuple[int, Seen]] = []  # not compared yet, with the number of the call
        self.x, self.dy = self.truth.inputs(0)
        self.y: torch.Tensor | None = None
        self.state: Any = None  # of an exchange: what was prepared
        self.stopped: dict[str, list[int | None]] = {}  # marks of what there was when the clock stopped
        self.wrong = ""

    @property
    def layers(self) -> list[MoELayer]:
        return [self.layer]

    def keep(self) -> list[torch.Tensor]:
        self.layer.zero_grad(set_to_none=True)
        return [*self.layer.parameters(), *self.layer.buffers()]

    def run(self, rep: int, watch: Stopwatch) -> list[Sample]:
        with torch.set_grad_enabled(self.experiment.backward):
            forward = self._forward()
            samples = [watch.measure(rep, "forward", forward, functools.partial(self._stop, "output"))]
            if self.experiment.backward:
                stop = functools.partial(self._stop, "gradients")
                samples.append(watch.measure(rep, "backward", self._backward, stop))
        self._see(f"timed repetition {rep}")
        return samples

    def warm_up(self) -> None:
        with torch.set_grad_enabled(self.experiment.backward):
            self._forward()()
            if self.experiment.backward:
                self._backward()
        self._see("warm-up")

    def _forward(self) -> Callable[[], None]:
        """Clear what the last call left, take this one's inputs and prepare; the work that remains is to be timed."""
        self.y = None
        self.layer.zero_grad(set_to_none=True)
        self.x, self.dy = self.truth.inputs(self.calls)
        self.x.requires_grad_(self.experiment.backward)
        exchange = self.experiment.phase == "exchange"
        if exchange:
            with Untimed("by prepare", products=True) as ahead:
                self.state = self.layer.prepare(self.x)
            self.wrong = self.wrong or ahead.wrong

        def forward() -> None:
            self.y = self.layer.exchange(self.x, self.state) if exchange else self.layer(self.x)

        return forward

    def _backward(self) -> None:
        assert self.y is not None
        self.y.backward(self.dy)

    def _see(self, name: str) -> None:
        """Outside the clock: keep what the call made, as far as it is to be compared."""
        assert self.y is not None
        if type(self.y) is not torch.Tensor:
            self.wrong = (
                self.wrong or f"the output is no tensor but a {type(self.y).__name__}, perhaps not computed yet"
            )
        dx = gradients = gate_weights = None
        if self.experiment.backward:
            dx = torch.zeros_like(self.x) if self.x.grad is None else self.x.grad
            with Untimed("by gradients", receives=True) as after:
                gradients = self.layer.gradients()
            self.wrong = self.wrong or after.wrong
            if isinstance(self.state, gates.Gated) and self.state.mix is None:
                gate_weights = self.state.ids, self.state.weights.grad
        for what, mark in self.stopped.items():
            if mark != marks(self._made(what)):
                self.wrong = self.wrong or f"{what} of {name} changed after the clock had stopped"
        self.stopped = {}
        name = f"call {self.calls} ({name})"
        self.seen.append((self.calls, see(self.truth.lens, name, self.y, dx, gradients, gate_weights)))
        self.calls += 1
        self.y = self.state = None

    def _made(self, what: str) -> list[torch.Tensor | None]:
        if what == "output":
            return [self.y]
        return [self.x.grad, *(parameter.grad for parameter in self.layer.parameters())]

    def _stop(self, what: str) -> None:
        self.stopped[what] = marks(self._made(what))

    def check(self) -> Verdict:
        """Collective: of all calls since the last check."""
        calls = [(seen, functools.partial(self.truth.given, call)) for call, seen in self.seen]
        self.seen = []
        late = Verdict({}, first_of(self.job, self.wrong))
        own, groups = self.case.of_rank(self.job.rank), self.case.groups  # experts have no gradients of other groups
        found = compare(
            Gates(self.job.part(groups), self.system.alone(), own, self.truth.weights),
            self.truth.lens,
            calls,
            allowed(self.system, roughest(self.case.dtype, self.case.exchange_dtype)),
            constant_gate=self.experiment.phase == "exchange" and not self.layer.gate_in_exchange,
            natural=not self.truth.prescribed,
            identity=self.truth.identity,
            cache=self.truth.known,
        )
        return late + (found if groups is None else over_groups(self.job, found))

    def known_cases(self, rep: int) -> list[Case]:
        return [self.case] if self.truth.prescribed else []

    def least_rows(self, rep: int) -> np.ndarray | None:
        return None

    def timelines(self) -> dict[str, Timeline]:
        return dict(getattr(self.layer, "timelines", {}))

    def close(self) -> None:
        """It keeps nothing."""


def draw_inputs(
    routing: Routing, hidden: int, directions: torch.Tensor | None, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a gradient of y, float64 [T_rank, M] each. Given ``Weights.directions``, the real gate routes x as
    ``routing`` says."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + rank)
    z, dy = torch.randn((2, routing.tokens[rank], hidden), generator=generator, dtype=torch.float64)
    if directions is None:
        return z, dy
    return gates.steer(z, directions, torch.as_tensor(routing.of_rank(rank).astype(np.int64))), dy


def check_routing(case: Case, oracle: Oracle, x: torch.Tensor, rank: int) -> None:
    """The gate must choose what the certificate will state: an error if it does not, for any token of this rank."""
    chosen, _ = gates.route(case.model, oracle.logits(x).detach(), oracle.bias)
    wanted = torch.as_tensor(case.routing.of_rank(rank).astype(np.int64))
    different = int((chosen.sort(-1).values != wanted.sort(-1).values).any(-1).sum())
    if different:
        raise ValueError(f"the gate routes {different} of {len(x)} tokens otherwise than the workload prescribes")
