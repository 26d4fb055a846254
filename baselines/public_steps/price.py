"""One published training step, priced from shapes, layout, recipe and the data sheet of its machine.

The judge (``harness.simulation``) says what a layer of a micro-batch asks for: multiply-adds of attention, experts and
head, bytes of the dispatcher. A step of PP stages, each of v parts, on m micro-batches lasts

    (m + (PP - 1) / v) (forward + backward of a stage)            1F1B, interleaved

The judge's machine does not know what a graphics processor does beside: passes over memory between the products, and
the host, which launches kernels one by one unless they are captured in a graph. Both are stated below, in round
numbers. They were chosen on the rows of two models (``studies.FITTED``); no other row had a part in that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from harness import presets
from harness.errors import bad
from harness.plan.cost import Compute, OnLinks, leaves
from harness.plan.machine import Machine
from harness.simulation import Training
from harness.specs import Cluster, Experiment, Model, Workload

SYSTEMS = {"alltoall": "megatron", "deepep": "megatron-deepep", "hybridep": "megatron-hybridep"}
FORMATS = {"BF16": 1, "FP8": 2, "MXFP8": 2}  # rate of products over that of bfloat16
#: forward passes over a tensor, reads and writes, in bfloat16: norms, residual sums and rotations of [T, M]; packing,
#: unpacking and rounding of routed rows [k T, M]; activation, its product and rounding of [k T, H], in one kernel with
#: the products or in kernels of their own. A backward makes twice as many.
HIDDEN_PASSES, ROUTED_PASSES = 20.0, 16 / 3
FFN_PASSES = {"full": 32 / 3, "partial": 100 / 3, "none": 100 / 3}
RECOMPUTED_PASSES = 3.0  # of [k T, H] in all, where the activation is computed again
#: of a layer's forward and backward, what the device waits for the host, by what of an iteration graphs capture
HOST_S = {"full": 0.0, "partial": 2e-3, "none": 3e-3}
MEMORY_SHARE, LINK_SHARE = 0.85, 0.8  # of the data sheet's rate, that copies and exchanges reach


@dataclasses.dataclass(frozen=True)
class Row:
    """As ``results/reported/public-steps.csv`` has it: ``gbs`` and ``mbs`` count sequences of ``seq`` tokens, of all
    GPUs and of one micro-batch; ``vp``: v, parts of a stage; ``overlap``: exchanges go on beside the computation of
    another micro-batch; ``graph``: what CUDA graphs capture of an iteration."""

    release: str
    model: str
    cluster: str
    gpus: int
    precision: str
    gbs: int
    mbs: int
    seq: int
    tp: int
    pp: int
    cp: int
    vp: int
    ep: int
    dispatcher: str
    overlap: str
    graph: str
    recompute: str
    tokens_per_s_per_gpu: float

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Row:
        """Of a row of the table; ``UserError`` names a field that cannot be."""
        row = cls(**{each.name: fields[each.name] for each in dataclasses.fields(cls)})
        known: dict[str, Iterable[str]] = {
            "dispatcher": SYSTEMS, "precision": FORMATS, "graph": HOST_S, "overlap": ("yes", "no"),
            "recompute": ("none", "activation"),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(row, name) not in values:
                raise bad(f"public-steps.{name}", getattr(row, name), f"must be one of {', '.join(values)}")
        for name in ("tp", "cp"):
            if getattr(row, name) != 1:
                raise bad(f"public-steps.{name}", getattr(row, name), "is not priced; only rows with 1 are")
        if row.gpus % (row.pp * row.ep) or row.gbs % (row.mbs * (row.gpus // row.pp)):
            raise bad("public-steps.gpus", row.gpus, "do not divide into stages, expert-parallel groups and batches")
        return row

    @property
    def micro_batches(self) -> int:
        """m, of each pipeline."""
        return self.gbs // (self.mbs * (self.gpus // self.pp))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of one micro-batch on a GPU of a stage: products at the rate that tiles of rows let reach, passes over
    memory, exchange, host. ``rounds``: m + (PP - 1) / v."""

    products_s: float
    memory_s: float
    exchange_s: float
    host_s: float
    rounds: float
    overlaps: bool

    def step_s(self, efficiency: float) -> float:
        """With products at ``efficiency`` of their rate."""
        busy = self.products_s / efficiency + self.memory_s
        return self.rounds * (self.host_s + (max(busy, self.exchange_s) if self.overlaps else busy + self.exchange_s))


def tokens_per_s(row: Row, efficiency: float) -> float:
    """Of a GPU."""
    return row.gbs * row.seq / row.gpus / parts(row).step_s(efficiency)


@functools.cache
def parts(row: Row) -> Parts:
    model = presets.model(row.model).model_copy(update={"seq": row.seq})
    cluster = _group(presets.cluster(row.cluster), row)
    tokens = row.mbs * row.seq
    products_s, exchange_s = _asked(model, cluster, SYSTEMS[row.dispatcher], tokens)
    assert cluster.device_bytes_per_s is not None
    memory_s = _passed_bytes(model, row) * tokens / (MEMORY_SHARE * cluster.device_bytes_per_s)
    host_s = HOST_S[row.graph] * model.num_layers
    rounds = row.micro_batches + (row.pp - 1) / row.vp
    return Parts(
        products_s / row.pp, memory_s / row.pp, exchange_s / row.pp, host_s / row.pp, rounds, row.overlap == "yes"
    )


@functools.cache
def _asked(model: Model, cluster: Cluster, system: str, tokens: int) -> tuple[float, float]:
    """Seconds of products and of exchanges in a micro-batch of ``tokens`` a rank through the whole model."""
    few, (moe, dense) = _few_layers(model)
    workload = Workload(name="balanced", tokens_per_rank=tokens, generator="balanced")
    experiment = Experiment(model=few, cluster=cluster, workload=workload, system=system, phase="train_step")
    machine = Machine.data_sheet(cluster)
    products_s = exchange_s = 0.0
    for task in Training(experiment).lay_out().tasks:
        times = _times(task.name, moe, dense)
        for cost in leaves(task.cost) if times else ():
            seconds = times * float(np.max(machine.seconds(cost)))
            if isinstance(cost, OnLinks):
                exchange_s += seconds / LINK_SHARE
            elif isinstance(cost, Compute) and np.any(cost.macs):
                products_s += seconds
    return products_s, exchange_s


def _few_layers(model: Model) -> tuple[Model, tuple[float, float]]:
    """A model with one layer of each kind, and how many of its MoE and dense layers of ``model`` each stands for."""
    num_moe = model.window_every
    num_dense = model.num_layers - model.num_moe_layers
    few = model.model_copy(
        update={"num_layers": num_moe + bool(num_dense), "num_dense_layers": int(bool(num_dense)), "moe_every": 1}
    )
    return few, (model.num_moe_layers / num_moe, float(num_dense))


def _times(task: str, moe: float, dense: float) -> float:
    """How often a micro-batch does what ``task`` does once in the few layers: none of what is done once a step."""
    if ".dense" in task:
        return dense
    if task.startswith("layer"):
        return moe
    return float(task in ("embedding", "embedding.backward", "head"))


def _group(cluster: Cluster, row: Row) -> Cluster:
    """An expert-parallel group on ``cluster``, in as few nodes as hold it, with products in the row's format."""
    outer, inner = cluster.levels
    inside = min(row.ep, inner.size)
    levels = (
        outer.model_copy(update={"size": row.ep // inside, "ports": inside}),
        inner.model_copy(update={"size": inside}),
    )
    assert cluster.device_flops_per_s is not None
    rate = FORMATS[row.precision] * cluster.device_flops_per_s
    return cluster.model_copy(update={"levels": levels, "device_flops_per_s": rate})


def _passed_bytes(model: Model, row: Row) -> float:
    """Of one token through the whole model, forward and backward."""
    width, there_and_back = 2, 3
    of_ffn = there_and_back * FFN_PASSES[row.graph] + (RECOMPUTED_PASSES if row.recompute == "activation" else 0.0)
    num_dense = model.num_layers - model.num_moe_layers
    columns = num_dense * (model.dense_ffn or 0) + model.num_moe_layers * (model.top_k * model.ffn + model.shared_size)
    rows = model.num_layers * HIDDEN_PASSES + model.num_moe_layers * model.top_k * ROUTED_PASSES
    return width * (of_ffn * columns + there_and_back * model.hidden * rows)
