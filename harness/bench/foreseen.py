"""What training steps must send whose system remembers the steps before: its course is followed, on the routing that
the workload prescribes, by the code that decides in the executed training.

A course that goes by a clock (how long an attention took, what an update would cost) is followed up to where it asks
for one.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np

from harness.plan.cost import transfers
from harness.specs import Experiment

#: of the processor, for which courses are followed in one check: steps are drawn and decided once more, which takes
#: as long as it took ahead of each of them
FOLLOW_S = 2.0


def received_bytes(experiment: Experiment, steps: Collection[int]) -> dict[int, np.ndarray]:
    """By each rank in each of ``steps`` that can be told in time, float64 [num_ranks], without what is summed."""
    from harness.simulation import Training  # no rank needs it that trains nothing

    training, until = Training(experiment, whole=True), time.process_time() + FOLLOW_S
    found: dict[int, np.ndarray] = {}
    for step in range(max(steps, default=-1) + 1):
        if training.course.watches(step) or (found and time.process_time() > until):
            break
        if step:
            training.come_to(step, priced=True)
        plan = training.lay_out() if step in steps else None
        moved = training.saw(step, None)
        if plan is not None:
            matrices = [each.matrix for each in transfers([*(task.cost for task in plan.tasks), moved])]
            found[step] = np.sum([matrix.sum(0) - np.diag(matrix) for matrix in matrices], axis=0)
    return found


__all__ = ["received_bytes"]
