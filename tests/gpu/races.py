"""Steps 9, 11 and 12: whole races on one GPU, one that does not fit, and the real packages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from baselines.flat import Flat
from harness import registry
from harness.bench import conformance, race
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.routing import planned_routing
from harness.specs import SERVING, Experiment, Model, Phase, Workload
from harness.system import Case
from tests.gpu.machine import CLUSTER, Machine
from tests.gpu.step import Skip, need

SYSTEMS = ("flat", "fsmoe", "hecate", "fastermoe")  # emulated: every other one
PHASES: tuple[Phase, ...] = ("exchange", "layer", "train_step", "prefill", "decode")
SMALL = Model(
    name="smoke", num_layers=2, hidden=64, ffn=32, num_experts=16, top_k=2, num_heads=4, seq=8, vocab=64
)  # fmt: skip
LARGE = SMALL.model_copy(update={"hidden": 512, "ffn": 512, "num_heads": 8, "seq": 256, "vocab": 8192})
SMALL_TOKENS, LARGE_TOKENS = 16, 2048
MEMORY_ERROR = 0.1


def races(machine: Machine) -> dict[str, Any]:
    """Every phase, with several systems where they have it: all are checked, timed, and finite."""
    found: dict[str, Any] = {"refused": {}}
    for phase in PHASES:
        racing = SYSTEMS[:: 2 if machine.emulated else 1]
        systems = racing if phase not in SERVING else racing[:1]
        outcomes = _race(machine, systems, phase)
        need(outcomes["flat"]["status"] != "refused", f"flat {phase}: refused: {outcomes['flat']['reason']}")
        for name, outcome in outcomes.items():
            if outcome["status"] == "refused":
                found["refused"][f"{name} {phase}"] = outcome["reason"]
                continue
            need(outcome["status"] == "ok", f"{name} {phase}: {outcome['status']}: {outcome['reason']}")
            _check_samples(machine, f"{name} {phase}", outcome["samples"])
        if not machine.emulated:
            found[phase] = {name: _seconds(outcome["samples"]) for name, outcome in outcomes.items()}
        if phase == "train_step":
            found |= _memory(machine, outcomes["flat"]["memory"])
    return found | machine.unseen("times on the device, and its allocator's peak")


def _race(machine: Machine, systems: tuple[str, ...], phase: Phase) -> dict[str, dict[str, Any]]:
    """Outcomes by system."""
    count = SMALL_TOKENS if machine.emulated else LARGE_TOKENS
    experiments = [
        Experiment(
            model=SMALL if machine.emulated else LARGE,
            cluster=CLUSTER,
            workload=Workload(
                name="smoke", tokens_per_rank=count, generator="natural" if phase == "decode" else "uniform"
            ),
            system=name,
            phase=phase,
            backward=phase not in SERVING,
        )
        for name in systems
    ]
    payload = {"experiments": [each.model_dump(mode="json") for each in experiments], "repeats": 2, "warmup": 1}
    cells = race.run_race(machine.job, payload)["cells"]
    return {each.system: cells[each.digest] for each in experiments}


def _check_samples(machine: Machine, name: str, samples: list[dict[str, Any]]) -> None:
    need(samples, f"{name}: no samples")
    for sample in samples:
        wall, device = sample["end_s"] - sample["start_s"], sample["device_s"]
        need(device is not None, f"{name}: no time of the device")
        if not machine.emulated:
            need(
                math.isfinite(device) and 0 < device <= wall, f"{name}: {device} s on the device, {wall} s on the wall"
            )


def _seconds(samples: list[dict[str, Any]]) -> float | None:
    """Of the last repetition, all directions, on the device."""
    last = max((sample["rep"] for sample in samples), default=None)
    return sum(sample["device_s"] for sample in samples if sample["rep"] == last) if samples else None


def _memory(machine: Machine, memory: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Measured over planned, by part. State must be what is planned; of activations and peak it is said where they are
    not, since that depends on which kernels torch fuses here."""
    shares = {part: memory["measured"][part] / value for part, value in memory["planned"].items() if value}
    wrong = {part: share for part, share in shares.items() if abs(share - 1) > MEMORY_ERROR}
    state = {part: share for part, share in wrong.items() if part in ("parameters", "gradients", "optimizer")}
    need(not state, f"state of a training step over what is planned: {state}")
    return {"memory_over_planned": shares} | ({} if machine.emulated else {"not_as_planned": sorted(wrong)})


# ---------------------------------------------------------------------- out of memory


class Greedy(Flat):
    """Wants more memory than the device has."""

    name = "greedy"

    @classmethod
    def build(cls, case: Any, job: Any, weights: Any) -> Any:
        if case.model.name != "smoke":  # the small check before the race
            return super().build(case, job, weights)
        return cls.take(job.device)

    @staticmethod
    def take(device: torch.device) -> torch.Tensor:
        blocks = []
        for _ in range(64):  # each a sixteenth of the device
            total = torch.cuda.get_device_properties(device).total_memory
            blocks.append(torch.empty(total // 16, dtype=torch.uint8, device=device))
        raise AssertionError("four times the device's memory was given out")


def out_of_memory(machine: Machine) -> dict[str, Any]:
    """A system that does not fit is a row that says so, and the next one runs."""
    _ = machine.device
    if machine.emulated:

        def take(device: torch.device) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate all of it")

        Greedy.take = staticmethod(take)  # type: ignore[method-assign, assignment]
    with _known(Greedy):
        outcomes = _race(machine, ("greedy", "flat"), "layer")
    greedy, flat = outcomes["greedy"], outcomes["flat"]
    need(greedy["status"] == "oom", f"a system that does not fit is {greedy['status']}: {greedy['reason']}")
    need(flat["status"] == "ok", f"the next system is {flat['status']}: {flat['reason']}")
    return {"reason_told": greedy["reason"][:200]} | machine.unseen("an allocator that has no more")


@contextlib.contextmanager
def _known(system: type[Flat]) -> Iterator[None]:
    """``system`` is registered for a while."""
    registry.systems()[system.name] = system
    try:
        yield
    finally:
        del registry.systems()[system.name]


# ---------------------------------------------------------------------- real packages


def packages(machine: Machine) -> dict[str, Any]:
    """Those that are installed, in bfloat16, against the oracle."""
    job, found = machine.job, {}
    known = [system for system in registry.systems().values() if system.kind == "package"]
    absent = {system.name: reason.split(";")[0] for system in known if (reason := system.missing())}
    if len(absent) == len(known):
        raise Skip("; ".join(absent.values()))
    for name in (system.name for system in known if system.name not in absent):
        for trial in ("uniform",) if machine.emulated else ("uniform", "swiglu"):
            row = conformance.check_one(job, name, trial, "bfloat16")
            need(row["status"] in ("ok", "refused"), f"{name} {trial}: {row['status']}: {row['reason']}")
            found[f"{name} {trial}"] = row["reason"] or row["errors"]
        found[f"{name} experts"] = _how(machine, name)
    return found | {"missing": absent} | machine.unseen("the packages' own CUDA kernels")


def _how(machine: Machine, name: str) -> str:
    """By which of its kernels a package computes its experts, in its own words."""
    workload = Workload(name="smoke", tokens_per_rank=16, generator="uniform")
    routing = planned_routing(workload, SMALL, machine.job.topology)
    placement = Placement.contiguous(SMALL.num_experts, 1)
    case = Case(SMALL, "bfloat16", machine.job.topology, placement, routing, str(machine.device))
    system = registry.system(name)
    return system.refuse(case) or system.build(case, machine.job, Weights(SMALL, "bfloat16")).how()


__all__ = ["out_of_memory", "packages", "races"]
