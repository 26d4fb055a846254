"""What a system's whole MoE layer costs over the tokens of a rank: forward and backward, as a black box."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness import presets, registry
from harness.bench.layer import LayerContender
from harness.bench.race import name_phase
from harness.bench.timing import Stopwatch, interleaved, quiet
from harness.case import case_of
from harness.comm.agree import first_said
from harness.comm.fits import TokensFit, judge
from harness.comm.job import Job
from harness.errors import bad
from harness.specs import Cluster, Experiment, Workload

TOKENS, HELD_OUT = (64, 128, 192, 256, 384, 512), (1, 4)
REPEATS = 5
DTYPE = "bfloat16"


def experiments(cluster: Cluster, system: str, model: str) -> list[Experiment]:
    """One for each of ``TOKENS``."""
    shapes, name = presets.model(model), registry.system(system).name
    if shapes.num_experts % cluster.num_ranks:
        remedy = f"its {shapes.num_experts} experts do not divide over {cluster.num_ranks} ranks; choose another model"
        raise bad("--model", model, remedy)
    return [
        Experiment(
            model=shapes,
            cluster=cluster,
            workload=Workload(name=f"balanced-{count}", tokens_per_rank=count),
            system=name,
            phase="layer",
            dtype=DTYPE,
        )
        for count in TOKENS
    ]


def measure(job: Job, payload: dict[str, Any]) -> dict[str, list[list[tuple[float, float]]]]:
    """Collective. ``payload``: ``experiments`` as plain data -> ``forward`` and ``backward``: [sizes][repeats] of
    (start, end) on this rank. Raises ``UserError`` if the system is missing or refuses."""
    contenders = []
    for data in payload["experiments"]:
        experiment = Experiment.model_validate(data)
        system, case = registry.system(experiment.system), case_of(experiment, str(job.device))
        name_phase(job, experiment, "building")
        if reason := first_said(job, system.missing() or system.refuse(case)):
            raise bad("--system", experiment.system, reason)
        contenders.append(LayerContender(job, system, experiment, case))
        contenders[-1].warm_up()
    spans: dict[str, list[list[tuple[float, float]]]] = {
        direction: [[] for _ in contenders] for direction in ("forward", "backward")
    }
    with quiet():
        watch = Stopwatch(job)
        for repeat, which in interleaved(len(contenders), REPEATS):
            name_phase(job, contenders[which].experiment, f"repetition {repeat}")
            for sample in contenders[which].run(repeat, watch):
                spans[sample.direction][which].append((sample.start_s, sample.end_s))
    return spans


def fit(of_ranks: list[dict[str, list[list[tuple[float, float]]]]], shared_clock: bool = True) -> dict[str, TokensFit]:
    """Of ``forward`` and ``backward``: the median over repetitions of last end minus first start, or, where nodes have
    clocks of their own, of the longest time that a rank saw pass."""
    fits = {}
    for direction in of_ranks[0]:
        spans = np.array([rank[direction] for rank in of_ranks])  # [ranks, sizes, repeats, 2]
        start, end = spans[..., 0], spans[..., 1]
        times = np.median(end.max(0) - start.min(0) if shared_clock else (end - start).max(0), axis=-1)
        fits[direction] = judge(TokensFit, TOKENS, times, HELD_OUT)
    return fits
