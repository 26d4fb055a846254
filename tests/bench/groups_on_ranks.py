"""What every rank does in ``test_groups``."""

from __future__ import annotations

from typing import Any
from unittest import mock

from harness import registry
from harness.bench import conformance, training_check
from harness.case import system_of
from harness.comm.job import Job
from harness.layout import Layout
from harness.plan import training
from harness.specs import Experiment


def checked(job: Job, payload: dict[str, Any]) -> list[dict[str, Any]]:
    return conformance.check(job, payload)


def varied(job: Job, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """A few steps of every variant of ``systems`` against the oracle."""
    layout = Layout.parse(payload["layout"], "layout").on(job.topology)
    return [
        {"system": name, **conformance.check_training(job, name, options, layout=layout)}
        for name in payload["systems"]
        for options in registry.system(name).variants.values()
    ]


def trained(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """A few steps against the oracle; ``fault``: gradients are not summed over an expert's replicas."""
    experiment = Experiment.model_validate(payload["experiment"])
    row = {"status": "ok", "reason": "", "errors": {}, "tolerance": None}
    whole = training.sum_over

    def all_but_experts(parameters: Any, group: Any) -> None:
        whole(parameters, None if group is job.part(experiment.groups).replicas else group)

    with mock.patch.object(training, "sum_over", all_but_experts if payload.get("fault") else whole):
        return training_check.gate_case(job, system_of(experiment), experiment, row)
