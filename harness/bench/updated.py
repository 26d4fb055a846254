"""What the optimizer made of experts, and where they went: a few numbers of each, ahead of a training step and behind
it, on whatever rank the expert is by then.

Where a layer's gradients are known, its numbers must be those of AdamW's own arithmetic, and so must the moments of
what may have moved. Other layers' can have changed by no more than a step of Adam can: an expert that has another one's
weights or moments is found by that.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist

from harness.bench.inside import parameters_of
from harness.bench.witness import Verdict
from harness.comm.job import Job
from harness.dtypes import TORCH_DTYPE
from harness.specs import GEMMS, Experiment
from harness.system import Gradients, MoELayer

NUMBERS = 16  # of each matrix of each expert
#: of a step's length: what a gradient's rounding may move a weight
ROUNDED = 0.02

_Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weights and both moments, float64 [E, n] each


class Updates:
    """Of a training's ``layers``. ``moves``: experts may change places behind a step."""

    def __init__(
        self,
        job: Job,
        experiment: Experiment,
        layers: Sequence[MoELayer],
        optimizer: torch.optim.Optimizer,
        *,
        moves: bool,
    ):
        self.job, self.experiment, self.layers, self.optimizer, self.moves = job, experiment, layers, optimizer, moves
        self.names = ("w1", "w2", "w3")[: GEMMS[experiment.model.ffn_type]]
        self.before: dict[int, _Kept] = {}

    def ahead(self, watched: Collection[int]) -> None:
        """Collective: remember what a step begins with. ``watched``: layers whose gradients will be known."""
        self.before = self._read(watched)

    def check(self, gradients: Mapping[int, Gradients], where: str, scale: float = 1.0) -> Verdict:
        """Collective, behind the step. ``gradients``: of the layers that were watched, as they were ahead of any
        move, multiplied by ``scale``."""
        after, steps = self._read(gradients), self._steps(gradients)
        gathered = self._gathered([each.experts for each in gradients.values()])
        own = {layer: of / scale for layer, of in zip(gradients, gathered, strict=True)}
        for layer, before in self.before.items():
            if reason := self._reason(before, after[layer], own.get(layer), steps):
                return Verdict({}, f"{reason[0]} of layer {layer} {where} {reason[1]}")
        return Verdict()

    def _reason(
        self, before: _Kept, after: _Kept, gradient: torch.Tensor | None, steps: Sequence[int]
    ) -> tuple[str, str] | None:
        """Whose numbers are wrong, and how. ``gradient`` [E, n]: where it is known; ``steps``: how many the optimizer
        may have made."""
        group, digits = self.optimizer.param_groups[0], torch.finfo(TORCH_DTYPE[self.experiment.dtype]).eps
        rate, (first, second) = float(group["lr"]), group["betas"]
        weight, mean, square = before
        kept = weight * (1 - rate * float(group["weight_decay"]))
        change, slack = (after[0] - kept).abs(), digits * kept.abs()
        if (e := _worst(change - slack - rate * (1 - first) / (1 - second) ** 0.5)) is not None:
            return (
                f"weights of expert {e}",
                f"changed by {float(change[e].max()):.3e}, more than a step of {rate:.0e} can",
            )
        if self.moves and (e := _worst(second * square * (1 - digits) - after[2])) is not None:
            return f"moments of expert {e}", "are smaller than the step before left them"
        if gradient is None:
            return None
        updated = (gradient != 0).any(1, keepdim=True)  # without a gradient there may be no step
        mean, square = first * mean + (1 - first) * gradient, second * square + (1 - second) * gradient.square()
        errors = []
        for t in steps:
            size = (square / (1 - second**t)).sqrt() + float(group["eps"])
            errors.append((after[0] - kept + rate / (1 - first**t) * mean / size).abs())
        if (e := _worst((torch.stack(errors).amin(0) - 2 * slack - ROUNDED * rate) * updated)) is not None:
            return f"weights of expert {e}", "are not what AdamW makes of its gradient"
        allowed = 2 * digits * (mean.abs() + gradient.abs())
        if self.moves and (e := _worst(((after[1] - mean).abs() - allowed) * updated)) is not None:
            return f"moments of expert {e}", "are not what AdamW makes of its gradient"
        return None

    def _read(self, watched: Collection[int]) -> dict[int, _Kept]:
        """Collective: by layer, of those that are looked at."""

        def moment(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
            found = self.optimizer.state.get(parameter, {}).get(name)
            return torch.zeros_like(parameter) if found is None else found

        layers = range(len(self.layers)) if self.moves else watched
        tables = []
        for each in (self.layers[layer] for layer in layers):
            tables.append(parameters_of(each).experts)
            for name in ("exp_avg", "exp_avg_sq"):
                tables.append(parameters_of(each, functools.partial(moment, name)).experts)
        found = self._gathered(tables)
        return {layer: (found[3 * i], found[3 * i + 1], found[3 * i + 2]) for i, layer in enumerate(layers)}

    def _steps(self, layers: Collection[int]) -> Sequence[int]:
        """Collective: how many steps the optimizer may have made of a parameter; one that has had no gradient lags."""
        parameters = (parameter for layer in layers for parameter in self.layers[layer].parameters())
        states = (self.optimizer.state.get(parameter, {}) for parameter in parameters)
        own = [int(state["step"]) for state in states if "step" in state]
        most = torch.tensor([max(own, default=1), -min(own, default=1)], device=self.job.device)
        if self.job.num_ranks > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return range(max(1, -int(most[1])), int(most[0]) + 1)

    def _gathered(self, tables: Sequence[Mapping[int, Mapping[str, torch.Tensor]]]) -> list[torch.Tensor]:
        """Collective: [E, n] of all ranks each, the mean where several have an expert."""
        width = NUMBERS * len(self.names)
        found = torch.zeros(len(tables), self.experiment.model.num_experts, width + 1, dtype=torch.float64)
        places = torch.rand(3, 2, NUMBERS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        for table, experts in zip(found, tables, strict=True):
            for e, of in experts.items():
                row = [_some(of[name], at) for name, at in zip(self.names, places, strict=False)]
                table[e, :-1], table[e, -1] = torch.cat(row).cpu(), 1
        found = found.to(self.job.device)
        if self.job.num_ranks > 1:
            dist.all_reduce(found)
        return list((found[..., :-1] / found[..., -1:].clamp_min(1)).cpu())


def _some(matrix: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Numbers [NUMBERS] of a matrix at ``places`` [2, NUMBERS], parts of its height and width."""
    rows, columns = (places * torch.tensor(matrix.shape)[:, None]).long().to(matrix.device)
    return matrix.detach()[rows, columns].double()


def _worst(excess: torch.Tensor) -> int | None:
    """Of which expert ``excess`` [E, n] is largest, if that is above 0 or no number."""
    largest = excess.nan_to_num(nan=torch.inf).amax(1)
    e = int(largest.argmax())
    return e if float(largest[e]) > 0 else None
