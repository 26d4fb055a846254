"""What stands before a training is raced: a few steps at reduced shape, against one process with the dense oracle."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from harness.bench.adam import adamw
from harness.bench.steered import OracleLayer
from harness.bench.train import Trainer, Training
from harness.bench.witness import first_of
from harness.case import case_of
from harness.comm.job import Job
from harness.comm.rows import accumulator
from harness.dtypes import TORCH_DTYPE, roughest
from harness.layer.weights import Weights
from harness.specs import Dtype, Experiment
from harness.system import System
from harness.topology import Topology

_GATE_STEPS = 4
#: how far the loss of a few steps may be from the oracle's. Seen: 7e-10, 1e-6 and 2e-4; a gradient that is not summed,
#: or an expert without gradients: 6e-4 to 2e-3, so that in bfloat16 the gradient check before this one must find it
LOSS_TOLERANCE: dict[Dtype, float] = {"float64": 1e-7, "float32": 2e-5, "bfloat16": 2e-3, "float16": 2.5e-4}


def gate_case(
    job: Job, system: type[System], experiment: Experiment, found: dict[str, Any], num_steps: int = _GATE_STEPS
) -> dict[str, Any]:
    """Collective: a few steps at reduced shape; the losses must be those of one process that trains the same GPT
    with the dense oracle in float64. ``found`` is ``conformance.gate_case``'s row; returns it with ``loss`` added."""
    small = reduced(experiment)
    trainer = Trainer(job, system, small)
    losses: list[float] = []
    while len(losses) - len(trainer.skipped) < num_steps:
        losses.append(trainer._job_loss(trainer._update(trainer.training.prepare(len(losses)))))
    expected = [torch.zeros(len(losses), dtype=torch.float64, device=job.device)]
    if job.rank == 0:
        found_by_oracle = oracle_losses(small, system, job.topology, len(losses), trainer.skipped)
        expected[0] += torch.tensor(found_by_oracle, dtype=torch.float64).to(job.device)
    if job.num_ranks > 1:
        dist.broadcast(expected[0], 0)
    wanted = expected[0].cpu().numpy()
    error = float(np.nan_to_num(np.abs(np.array(losses) - wanted) / np.abs(wanted), nan=np.inf).max())
    row = {**found, "errors": {**found["errors"], "loss": error}}
    tolerance = LOSS_TOLERANCE[roughest(experiment.dtype, experiment.exchange_dtype)]
    if error > tolerance:
        reason = f"loss of {num_steps} steps off by {error:.1e} of the oracle's, allowed {tolerance:.0e}"
    else:
        reason = first_of(job, _laid_out(trainer.training.gpt)) or _with_others_weights(trainer)
    if reason:
        row["status"], row["reason"] = "nonconforming", reason
    return row


def _laid_out(gpt: nn.Module) -> str:
    """Which gradient lies in memory in an order that is not its parameter's, in which a fused optimizer reads it."""
    for name, parameter in gpt.named_parameters():
        gradient = parameter.grad
        if gradient is None or (gradient.is_contiguous() and parameter.is_contiguous()):
            continue
        if gradient.stride() != parameter.stride():
            return f"the gradient of {name} lies with strides {gradient.stride()}, not {parameter.stride()}"
    return ""


def _with_others_weights(trainer: Trainer) -> str:
    """Collective: a step of every layer with experts of which all numbers have changed their sign since the step
    before -> what is wrong. Steps of the optimizer are so small that a system may compute with the weights of the step
    before, or with some that it has copied, and be within the tolerance."""
    routers = {id(p) for p in trainer.training.routers()}
    experts = [p for layer in trainer.layers for p in layer.parameters() if id(p) not in routers]
    for _ in trainer.layers:
        with torch.no_grad():
            for parameter in experts:
                parameter.neg_()
        trainer.warm_up()
    found = trainer.check().reason
    return found and f"when all experts had changed their signs: {found}"


def oracle_losses(
    experiment: Experiment,
    system: type[System],
    topology: Topology,
    num_steps: int,
    skipped: Collection[int] = (),
) -> list[float]:
    """Losses of the same training in one process: dense oracle, float64, all ranks' tokens in one batch. Between steps
    parameters are what the experiment's format holds of them, as every system's are: in bfloat16 a norm's weight of 1
    stays what it is when a step of 0.001 is added, which has nothing to do with the layer. float16 has float32 weights
    behind them. Steps that are ``skipped`` update nothing."""

    def moe(layer: int, weights: Weights) -> OracleLayer:
        return OracleLayer(weights, system, case_of(experiment, layer=layer))

    ranks = list(range(topology.num_ranks))
    training = Training(experiment, topology, moe, ranks=ranks, dtype=torch.float64)
    routers, dtype = {id(p) for p in training.routers()}, TORCH_DTYPE[experiment.dtype]
    trained = [p for of in training.optimizer.param_groups for p in of["params"]]
    wide = accumulator(dtype)
    formats = [wide if id(p) in routers else dtype for p in trained]
    held = [
        nn.Parameter(p.detach().to(wide if each == torch.float16 else each))
        for p, each in zip(trained, formats, strict=True)
    ]
    optimizer = adamw(held)
    losses = []
    for step in range(num_steps):
        loss = training.loss(training.prepare(step))
        loss.backward()
        for parameter, own in zip(trained, held, strict=True):
            own.grad = None if parameter.grad is None else parameter.grad.to(own.dtype)
        if step not in skipped:
            optimizer.step()
        with torch.no_grad():
            for parameter, own, each in zip(trained, held, formats, strict=True):
                parameter.copy_(own.to(each))
        losses.append(float(loss.detach()))
    return losses


def reduced(experiment: Experiment) -> Experiment:
    """The same training, small enough for the oracle: the same E, k, gate and FFN type, one short sequence a rank."""
    model = experiment.model
    head_dim = None if model.head_dim is None else 24  # not what the heads would have else
    of_gpt: dict[str, Any] = {"num_heads": 4, "head_dim": head_dim, "seq": 16, "vocab": 256}
    small = model.shrunk(min(2, model.num_moe_layers), **of_gpt)
    generator = "natural" if experiment.workload.generator == "natural" else "uniform"
    workload = experiment.workload.model_copy(
        update={"name": "gate", "generator": generator, "params": {}, "tokens_per_rank": 16}
    )
    return experiment.model_copy(update={"model": small, "workload": workload, "compute": "real"})
