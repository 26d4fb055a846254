"""Losses of timed training steps: those of the oracle at full shape as far as it is affordable, and those of the other
systems in the race, which train the same model on the same tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.bench import train, training_check
from harness.bench.witness import Verdict
from harness.case import system_of
from harness.comm.job import Job
from harness.dtypes import SHORT, roughest
from harness.layer.work import parameters
from harness.specs import Experiment

#: multiply-adds that the oracle may take in one race, on one core in float64: about a second. The steps that these
#: buy are compared, the others with the other systems alone
AFFORDABLE_MACS = 4e9
#: steps after which rounding may have grown once more to what a few steps are allowed
GROWS_EVERY = 8
#: tokens of the job with which the tolerances of losses were measured. A loss is a mean of tokens' losses, and so is
#: what rounding makes of it: of fewer tokens it is more. Measured in bfloat16 with 48 tokens: right systems up to
#: 2.1e-3 in step 3, where 5.5e-3 is allowed
MEASURED_TOKENS = 192
#: where the gate chooses for itself, rounding sends a few tokens elsewhere: so many times more is allowed, and this
#: part of one token's loss. Measured with 96 tokens a rank, 2 ranks, 2 layers, hidden 288, float32: systems send no
#: token differently; losses are off by 3e-7 to 4e-5 of the oracle's in four steps (3.4e-4 in six), by 2e-6 of each
#: other's. Gradients of attention or gate that are not summed, or none of experts: 1.7e-3 to 2.3e-2 in the second step,
#: where 1.9e-3 is allowed, up to 1.1e-1 in the fourth
NATURAL, OF_A_TOKEN = 5, 0.3
#: steps of such a training in bfloat16 that are compared so, and what is allowed later: all but what is far off.
#: Measured as above, hidden 288 and 512: of 192 tokens systems send up to 20 differently in the second step and up to
#: 190 after the third; right ones are off by 6e-4, 4e-3, 6e-3 and then 5e-2 of the oracle's and 4e-2 of each other's.
#: Without a choice (all experts taken) it is 5e-3, with a prescribed one 2e-3. Attention that is not summed: 2.2e-2 or
#: more in the second or third step, where 1.3e-2 and 1.4e-2 are allowed, and 5e-2 later, which rounding does, too; the
#: other faults are up to 4e-3 there, and the check of gradients finds them (8e-2 and more, 2e-2 allowed)
TOGETHER, LATER = 3, 0.25


def affordable_steps(experiment: Experiment, num_steps: int) -> int:
    """How many of the first ``num_steps`` the oracle may take."""
    model, tokens = experiment.model, sum(experiment.workload.tokens(experiment.cluster.num_ranks))
    macs = 3 * tokens * parameters(model, embeddings=1)
    macs += 3 * tokens * model.num_layers * 2 * model.seq * model.num_heads * model.head
    return int(min(num_steps, AFFORDABLE_MACS // macs))


def allowed(experiment: Experiment, step: int) -> float:
    """Relative difference of two right losses of a step: steps build on each other's rounding, and on each other's
    choices where rounding decides some."""
    num_tokens = sum(experiment.workload.tokens(experiment.cluster.num_ranks))
    dtype = roughest(experiment.dtype, experiment.exchange_dtype)
    limit = training_check.LOSS_TOLERANCE[dtype] * max(1.0, (MEASURED_TOKENS / num_tokens) ** 0.5)
    if experiment.workload.generator == "natural":
        if dtype in SHORT and step >= TOGETHER:
            return LATER
        limit = NATURAL * limit + OF_A_TOKEN / num_tokens
    return limit * (1 + step / GROWS_EVERY)


def check(job: Job, trainers: Sequence[tuple[Experiment, train.Trainer]]) -> dict[str, Verdict]:
    """Collective, by digest: of those trainings of a race that are right so far. Not where values mean nothing."""
    found: dict[str, Verdict] = {}
    trainers = [each for each in trainers if each[0].compute == "real"]
    groups: dict[Any, list[tuple[Experiment, train.Trainer]]] = {}
    for experiment, trainer in trainers:
        # Nor are those that have skipped other steps.
        groups.setdefault((_rule(experiment), frozenset(trainer.skipped)), []).append((experiment, trainer))
    for of in groups.values():
        experiment, trainer = of[0]
        steps, skipped = sorted(trainer.losses), trainer.skipped
        known = _of_oracle(job, experiment, affordable_steps(experiment, steps[-1] + 1), skipped) if steps else {}
        for each, other in of:
            found[each.digest] = _against(each, other.losses, known, "the oracle's")
        peers = [(each, other) for each, other in of if not found[each.digest].reason]
        for each, other in peers if len(peers) > 1 else ():
            shared = set.intersection(*(set(peer.losses) for _, peer in peers))
            middle = {step: float(np.median([peer.losses[step] for _, peer in peers])) for step in shared}
            words = "the race's median" if len(peers) > 2 else "half way to the other system's"
            found[each.digest] += _against(each, other.losses, middle, words)
    return found


def _rule(experiment: Experiment) -> Any:
    """Trainings of one race lose tokens by one rule, or by different ones, and are then not the same."""
    if experiment.model.capacity_factor is None:
        return None
    rule = system_of(experiment).alone().kept.__func__  # type: ignore[attr-defined]
    return experiment.model.capacity_factor, rule, repr(sorted(experiment.options.items())), experiment.groups


def _of_oracle(job: Job, experiment: Experiment, num_steps: int, skipped: Collection[int]) -> dict[int, float]:
    """Collective: rank 0 works them out."""
    losses = torch.zeros(num_steps, dtype=torch.float64, device=job.device)
    if job.rank == 0 and num_steps:
        system = system_of(experiment)
        found = training_check.oracle_losses(experiment, system, job.topology, num_steps, skipped)
        losses += torch.tensor(found, dtype=torch.float64).to(job.device)
    if job.num_ranks > 1 and num_steps:
        dist.broadcast(losses, 0)
    return dict(enumerate(losses.tolist()))


def _against(experiment: Experiment, losses: dict[int, float], wanted: dict[int, float], whose: str) -> Verdict:
    verdict, worst = Verdict(), 0.0
    for step in sorted(set(losses) & set(wanted)):
        error, limit = abs(losses[step] - wanted[step]) / abs(wanted[step]), allowed(experiment, step)
        error = error if np.isfinite(error) else np.inf
        verdict.errors["loss"] = max(error, verdict.errors.get("loss", 0.0))
        if error / limit > max(1.0, worst):
            worst = error / limit
            verdict.reason = (
                f"loss {losses[step]:.7g} of step {step} off by {error:.3e} from {whose} {wanted[step]:.7g}, "
                f"allowed {limit:.3e}"
            )
    return verdict
