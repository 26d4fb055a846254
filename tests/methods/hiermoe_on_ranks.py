"""What every rank does in the tests of HierMoE's training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from harness.bench import conformance, train
from harness.bench.trials import BASE, TRIALS
from harness.comm.job import Job
from harness.placement import Placement
from harness.plan.moving import Move, move
from harness.registry import system
from harness.routing import planned_routing
from harness.specs import Experiment, Workload
from methods.hiermoe.training import Swapper


def trained(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Losses of training, and what was swapped."""
    experiment = Experiment.model_validate(payload["experiment"])
    trainer = train.Trainer(job, system(experiment.system), experiment)
    losses = [
        trainer._job_loss(trainer._update(trainer.training.prepare(step))) for step in range(payload["num_steps"])
    ]
    swapper = trainer.after_step
    made = swapper.made if isinstance(swapper, Swapper) else []
    return {
        "losses": losses,
        "swaps": [(step, layer, swap.r, swap.c) for step, layer, swap in made],
        "better": all(swap.after_s < swap.before_s for _, _, swap in made),
        "owners": [layer.exchange_.placement.owner.tolist() for layer in trainer.layers],
        "skipped": getattr(swapper, "skipped", 0),
        "placed": getattr(swapper, "placed", 0),
        "dimensions": [getattr(layer.exchange_, "used", 0) for layer in trainer.layers],
        "kinds": [task.kind for task in trainer.timelines()["step"].plan.tasks],
    }


def moved(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Two layers' experts, marked by their number, through ``payload["rounds"]`` random placements."""
    num_experts, rng = 2 * job.num_ranks, np.random.default_rng(payload["seed"])
    placements = [Placement.contiguous(num_experts, job.num_ranks)] * 2
    layers = []
    for i, placement in enumerate(placements):
        own = torch.as_tensor(placement.local(job.rank), dtype=torch.float64)
        layers.append(
            [
                torch.nn.Parameter((100 * i + own)[:, None].repeat(1, 3)),
                torch.nn.Parameter((1000 + own).bfloat16()[:, None]),
            ]
        )
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer])
    for layer in layers:
        for p in layer:
            optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": p.detach() + 0.5, "exp_avg_sq": -p.detach()}
    sent = 0
    for _ in range(payload["rounds"]):
        after = [
            Placement.of_slots(np.split(rng.permutation(num_experts), job.num_ranks)) if i else placements[0]
            for i in range(2)
        ]
        after[0] = placements[0].swapped([tuple(rng.choice(num_experts, 2, replace=False).tolist())])
        moves = [Move(*each) for each in zip(layers, placements, after, strict=True)]
        sent += move(job, moves, optimizer if payload["states"] else None)
        placements = after
    wrong, along = [], []
    for i, (layer, placement) in enumerate(zip(layers, placements, strict=True)):
        own = torch.as_tensor(placement.local(job.rank), dtype=torch.float64)
        for p, marks in zip(layer, (100 * i + own, 1000 + own), strict=True):
            expected = marks[:, None].to(p.dtype).expand_as(p)
            state = optimizer.state[p]
            if not torch.equal(p, expected):
                wrong.append(f"layer {i}: {p.detach()[:, 0].tolist()} at {own.tolist()}")
            along.append(torch.equal(state["exp_avg"], p + 0.5) and torch.equal(state["exp_avg_sq"], -p))
    return {"wrong": wrong, "sent": sent, "along": all(along)}


def every_way(job: Job, payload: dict[str, Any]) -> list[str]:
    """All ``ways`` (options) of a system in float64 on ``trials``; returns what does not equal the oracle."""
    wrong = []
    for name in payload["trials"]:
        trial = TRIALS[name]
        model = BASE.model_copy(update=trial.model)
        tokens = (11, 16, 5, 9, 16, 0, 13, 2)[: job.num_ranks]
        workload = Workload(name=name, tokens_per_rank=tokens, generator=trial.generator, params=trial.params)
        routing = planned_routing(workload, model, job.topology)
        for way in payload["ways"]:
            row = conformance.compare(job, system(payload["system"]), model, "float64", routing, options=way)
            if row["status"] != "ok":
                wrong.append(f"{name} {way}: {row['reason'] or row['status']}")
    return wrong
