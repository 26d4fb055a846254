"""What is the same for all systems, done once: the dense oracles, their inputs and weights, which are the host's alone.

They are made outside the emulated device's mode, in which every operation takes several times as long; whatever of the
device came into them would raise. Nothing that a system does on the device is spared.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from harness import registry
from harness.bench import conformance, race, serve, serving_check, timing, training_check
from harness.layer.weights import Weights
from harness.specs import Experiment
from harness.system import Case, System
from harness.topology import Topology

GATE_STEPS = 2  # of a training beside the oracle's
PROFILE_TOKENS = 64  # that a placement is planned by


def install() -> None:
    """Change the harness in this process."""
    Weights._draw = _drawn_once(Weights._draw)  # type: ignore[method-assign]
    conformance.draw_tokens = _once(conformance.draw_tokens, _tokens_key)
    conformance._oracle = _once(conformance._oracle, _layer_key)
    training_check.oracle_losses = _once(training_check.oracle_losses, _losses_key)
    serving_check.oracle_logits = _once(serving_check.oracle_logits, _logits_key)
    training_check.gate_case = functools.partial(training_check.gate_case, num_steps=GATE_STEPS)
    serve.PROFILE_TOKENS = PROFILE_TOKENS
    timing._CALIBRATIONS, timing.START_MARGIN_S = 1, 0.0  # no time is measured
    race.quiet = contextlib.nullcontext  # a collection over all that has been imported takes seconds


def _once(function: Callable[..., Any], key_of: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` outside the device's mode, once for each key."""
    found: dict[Any, Any] = {}

    @functools.wraps(function)
    def once(*args: Any, **kwargs: Any) -> Any:
        key = key_of(*args, **kwargs)
        if key not in found:
            with _disable_current_modes():
                found[key] = function(*args, **kwargs)
        return found[key]

    return once


def _drawn_once(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    once = functools.cache(draw)

    def copy(*args: Any) -> torch.Tensor:
        with _disable_current_modes():
            return once(*args).clone()

    return copy


# ------------------------------------------------------------------------------------------- what results depend on


def _rule(system: type[System], options: Any) -> Any:
    """Whatever says which tokens are dropped."""
    return None if system.kept.__func__ is System.kept.__func__ else (system, repr(options))  # type: ignore[attr-defined]


def _tokens_key(weights: Weights, routing: Any, prescribed: bool = True) -> Any:
    return weights, routing.ids.tobytes(), routing.tokens, prescribed


def _layer_key(system: type[System], case: Case, weights: Weights, xs: Any, dys: Any, constant_gate: bool) -> Any:
    rule = _rule(system, case.options)
    return weights, case.identity_experts, case.routing.ids.tobytes(), id(xs), constant_gate, rule  # ``xs`` are kept


def _losses_key(experiment: Experiment, system: type[System], topology: Topology, num_steps: int) -> Any:
    return _without_system(experiment), topology.shape, num_steps, _rule(system, experiment.options)


def _logits_key(experiment: Experiment, topology: Topology) -> Any:
    rule = _rule(registry.system(experiment.system), experiment.options)
    return _without_system(experiment), topology.shape, rule


def _without_system(experiment: Experiment) -> str:
    return experiment.model_dump_json(exclude={"system", "options", "model_parallel"})
