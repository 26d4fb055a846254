"""Hecate (arXiv 2502.02581): fully sharded sparse data parallelism over the experts of MoE layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from harness.comm.job import Job
from harness.plan.replicated import ReplicatedLayer, ReplicatedSystem
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES
from harness.system import AfterStep, Case, MoELayer
from methods.hecate.between import Reshards
from methods.hecate.memory_model import capacity
from methods.hecate.policy import RESHARD_EVERY, WINDOW, Options
from methods.hecate.policy import Hecate as Materialisation
from methods.hecate.training import Sharder


class Hecate(ReplicatedSystem):
    """One owner for every expert's state; for each iteration the most loaded experts are materialised elsewhere."""

    name = "hecate"
    title = "Hecate (FSSDP): sharded experts, the loaded ones materialised under the attention"
    source = "arXiv 2502.02581, sections 3 to 5"
    rematerialise: ClassVar[bool] = False
    recipe: ClassVar[dict[str, str]] = {"state": "hecate"}
    still: ClassVar[dict[str, int]] = {"reshard_every": 0}
    options: ClassVar[dict[str, str]] = {
        "t": "overlap degree, experts that are materialised elsewhere (default: in training as many as are gathered "
        "while the attention computes, T_non-MoE * bw / expert_size, profiled in its second step; E / ranks where "
        "there is no attention or no known bandwidth)",
        "m": "memory capacity, copies that a device takes of each layer (default: what fits the memory that the "
        "cluster states for a device, beside a training step's state and activations; t where it states none)",
        "window": f"iterations of the load estimate (default {WINDOW})",
        "reshard_every": f"training steps between re-shardings, 0: never (default {RESHARD_EVERY})",
        "rematerialise": "true: copies are let go after a layer's forward and gathered again in backward (default "
        "false; of hecate-rm true)",
        "calibrate": "true: after the gate more copies by the true loads, on the critical path, where that pays by the "
        "cluster's costs (default false)",
    }

    variants: ClassVar[dict[str, dict[str, bool | int | float | str]]] = {
        "materialised and re-sharded": {"t": 4, "window": 2, "reshard_every": 3},
        "little memory, calibrated": {"t": 6, "m": 1, "reshard_every": 4, "calibrate": True},
        "re-materialised": {"t": 4, "m": 2, "reshard_every": 3, "rematerialise": True},
    }

    @classmethod
    def policy(cls, case: Case, job: Job | None) -> Materialisation:
        options = Options.of(case, cls.rematerialise)
        num_experts = case.model.num_experts
        t = num_experts // case.topology.num_ranks if options.t is None else options.t
        policy = Materialisation(case, options, t, cls._capacity(case, options))
        policy.saw(expert_counts(case.routing))  # a layer alone has the same routing again and again
        return policy

    @classmethod
    def copied_parameters(cls, case: Case) -> int:
        options = Options.of(case, cls.rematerialise)
        copies = min(cls._capacity(case, options), options.t or 0)
        return copies * ((1 if options.rematerialise else case.model.num_moe_layers) + 1)  # one layer's gradients

    @classmethod
    def _capacity(cls, case: Case, options: Options) -> int:
        if options.m is not None:
            return options.m
        if case.room_bytes is None:
            return case.model.num_experts
        return capacity(case.model, case.room_bytes, remat=options.rematerialise, width=DTYPE_BYTES[case.dtype])

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep:
        replicated = [layer for layer in layers if isinstance(layer, ReplicatedLayer)]
        return Sharder(job, replicated, case, Options.of(case, cls.rematerialise))

    @classmethod
    def course(cls, cases: Sequence[Case]) -> Reshards:
        return Reshards(cls, cases, Options.of(cases[0], cls.rematerialise))


class HecateRM(Hecate):
    """Hecate with re-materialisation."""

    name = "hecate-rm"
    title = "Hecate with re-materialisation: one layer's copies at a time"
    source = "arXiv 2502.02581, section 5 (Hecate-RM)"
    rematerialise = True
    recipe: ClassVar[dict[str, str]] = {"state": "hecate-rm"}
    variants = {}  # of Hecate's


#: brought to recipes, by name
STATES = {"hecate": Hecate, "hecate-rm": HecateRM}
