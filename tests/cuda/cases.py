"""What every system does on the emulated device: some trials of conformance, then a race of its own in every phase."""

from __future__ import annotations

import dataclasses
from typing import Any

from harness import registry
from harness.specs import SERVING, Dtype, Experiment, Model, Workload, with_levels

Options = dict[str, bool | int | float | str]

TOPOLOGY = (2, 2)
TRIALS: tuple[tuple[str, Dtype], ...] = (
    ("uniform", "bfloat16"),
    ("experts-without-tokens", "float64"),
    ("rank-without-tokens", "float64"),
    ("drops", "float64"),
)
PHASES = ("exchange", "layer", "train_step", "prefill", "decode")
#: what nearly all faults show in; the rest is driven by a long test
FIRST = ("uniform", "layer", "prefill")
MODEL = Model(name="small", num_layers=2, hidden=32, ffn=32, num_experts=8, top_k=2, num_heads=4, seq=8, vocab=64)
CLUSTER = with_levels(
    "emulated-cuda",
    [
        {"name": "node", "size": 2, "bandwidth_bytes_per_s": 1e9},
        {"name": "rank", "size": 2, "bandwidth_bytes_per_s": 1e10},
    ],
    kind="physical",
)
#: changes to ``MODEL``: what drops by the tokens of a batch has room for all, since one token is decoded at a time
MODELS: dict[str, dict[str, Any]] = {"deepspeed-drop": {"capacity_factor": 8.0}}
#: options of a system in all that it does, where they change what happens on the streams; of others the defaults
OPTIONS: dict[str, Options] = {
    "eplb": {"rearrange_every": 1},
    "flexmoe": {"rearrange_every": 1},
    "fsmoe": {"degree_forward": 4, "degree_backward": 4},
    "hecate-rm": {"reshard_every": 1, "t": 4, "m": 4},
    "hiermoe": {"swap_every": 1, "chunks": 2},
    "hiermoe-hd": {"chunks": 2},
    "hiermoe-hd2": {"chunks": 2},
    "hiermoe-hd2-smart": {"place_every": 1, "chunks": 2},
    "smartmoe": {"place_every": 1},
}
#: and with which it trains once more; of systems that are in neither table, with each of their own ``variants``
TRAININGS: dict[str, dict[str, Options]] = {
    "fastermoe": {"shadows": {"shadows": 3}},
    "hecate": {
        "re-sharded": {"reshard_every": 1, "t": 4, "m": 4},
        "re-materialised": {"rematerialise": True, "t": 4, "m": 4},
    },
}
#: phases that a system goes through with its attention's heads shared out, too: the same for all systems, so for one
MODEL_PARALLEL = {"flat": ("train_step", "prefill", "decode")}


@dataclasses.dataclass(frozen=True)
class Cell:
    """``trial``: of conformance, in ``dtype``; else a race of one system in ``phase``."""

    system: str
    phase: str
    trial: str = ""
    dtype: Dtype = "float32"
    variant: str = ""
    options: Options = dataclasses.field(default_factory=dict)
    model_parallel: bool = False
    planted: str = ""  # a fault of ``ranks.FAULTS``

    @property
    def first(self) -> bool:
        """Whether the shorter test drives it."""
        return not self.variant and (self.trial or self.phase) in FIRST

    @property
    def name(self) -> str:
        parts = (self.system, self.phase, self.trial, self.dtype if self.trial else "", self.variant, self.planted)
        return " ".join(part for part in parts if part)

    @property
    def experiment(self) -> Experiment:
        training = self.phase == "train_step"
        workload = Workload(
            name="small",
            tokens_per_rank=16,
            generator="rotating" if training else "natural" if self.phase == "decode" else "uniform",
            params={"hot_experts": 2, "period": 1} if training else {},
        )
        return Experiment(
            model=MODEL.model_copy(update=MODELS.get(self.system, {})),
            cluster=CLUSTER,
            workload=workload,
            system=self.system,
            phase=self.phase,  # type: ignore[arg-type]
            backward=self.phase not in SERVING,
            dtype=self.dtype,
            options=self.options,
            model_parallel=self.model_parallel,
        )


#: packages that compute by CUDA kernels of their own, which nothing here can run
OWN_KERNELS = ("tutel", "tutel-2dh")


def not_here(system: str) -> str | None:
    """Why nothing of ``system`` can run on the emulated device."""
    if (reason := registry.system(system).missing()) is not None:
        return reason
    return f"{system} computes by CUDA kernels of its own" if system in OWN_KERNELS else None


def cells_of(system: str) -> list[Cell]:
    """Of any system, whether it is known here or not."""
    options = OPTIONS.get(system, {})
    cells = [Cell(system, "check", trial, dtype, options=options) for trial, dtype in TRIALS]
    cells += [Cell(system, phase, options=options) for phase in PHASES]
    own = {} if system in OPTIONS else registry.system(system).variants
    trainings: dict[str, Any] = TRAININGS.get(system, own)
    cells += [Cell(system, "train_step", variant=name, options=options) for name, options in trainings.items()]
    for phase in MODEL_PARALLEL.get(system, ()):
        cells.append(Cell(system, phase, variant="model-parallel", model_parallel=True))
    return cells


#: faults of the harness that must be seen in what systems do
PLANTED = [
    Cell("fsmoe", "check", "uniform", "float64", options=OPTIONS["fsmoe"], planted="nothing recorded"),
    Cell("hecate", "check", "uniform", "float64", planted="nothing recorded"),
    Cell("flat", "check", "uniform", "float64", planted="nothing waited for"),
    Cell("flat", "check", "uniform", "float64", planted="summed on the host"),
]
