"""Systems that must not pass, for the tests of the bench; and one that does nothing, to time the bench itself."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from baselines.flat import Flat
from harness import registry
from harness.bench import layer_cost, race
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.specs import Dtype
from harness.system import Case, Gradients, MoELayer, System


class EmptyLayer(MoELayer):
    gate_in_exchange = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    def gradients(self) -> Gradients:
        return Gradients({}, {})

    def shared_parameters(self) -> list[torch.nn.Parameter]:
        return []


class Empty(System):
    """Returns its input: what remains is the bench's own time."""

    name = "empty"
    title = "nothing"
    kind = "native"
    source = "tests"

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        return 1e-6

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        return EmptyLayer()


class ForgetsOnce(Flat):
    """Conforms at the gate's reduced shape and loses a token at full shape."""

    name = "forgets"

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        layer = super().build(case, job, weights)
        if case.identity_experts:
            whole = layer.exchange
            lost = torch.ones(case.routing.tokens[job.rank], 1)
            lost[-1] = 0
            layer.exchange = lambda x, state: whole(x, state) * lost  # type: ignore[method-assign]
        return layer


class Raises(Flat):
    """Every rank raises where it builds at full shape."""

    name = "raises"

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        if case.identity_experts:
            raise MemoryError("no room for this layer")
        return super().build(case, job, weights)


class Dies(Flat):
    """One rank ends without a word, the others wait for it."""

    name = "dies"

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        if case.identity_experts and job.rank == 1:
            os._exit(7)
        return super().build(case, job, weights)


class BadDay(Flat):
    """One rank raises in the third repetition, at full shape."""

    name = "badday"

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        layer = super().build(case, job, weights)
        full = case.identity_experts or case.routing.tokens[0] >= 64
        if full and job.rank == job.num_ranks // 2:
            calls = itertools.count()
            for name in ("exchange", "forward"):
                setattr(layer, name, cls._fails(getattr(layer, name), calls))
        return layer

    @staticmethod
    def _fails(whole: Callable[..., torch.Tensor], calls: Iterator[int]) -> Callable[..., torch.Tensor]:
        def run(*args: Any) -> torch.Tensor:
            if next(calls) == 3:  # one untimed call came before
                raise RuntimeError("bad day")
            return whole(*args)

        return run


class Narrow(Flat):
    """One rank alone has no memory left, in the first step at full shape; the others are in a collective by then."""

    name = "narrow"

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        layer = super().build(case, job, weights)
        if case.identity_experts and job.rank == job.num_ranks - 1:
            layer.exchange = lambda x, state: torch.empty(1 << 50)  # type: ignore[method-assign]
        return layer


ALL: tuple[type[System], ...] = (Empty, ForgetsOnce, Raises, Dies, BadDay, Narrow)


def register() -> None:
    """Make them known to this process."""
    registry.systems().update({system.name: system for system in ALL})


def run_race(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """``harness.bench.race.run_race`` on a rank that knows these systems too."""
    register()
    return race.run_race(job, payload)


def layer_cost_of(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """The same for ``harness.bench.layer_cost.measure``."""
    register()
    return layer_cost.measure(job, payload)
