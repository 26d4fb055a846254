"""What Hecate's studies share: a model on a cluster at the largest batch, and all systems simulated over one training.

Interpretation: batches are not printed, only that each comparison takes the largest on which no system runs out of
memory. Here that is computed by the memory model, of EP and every rival; Hecate materialises in what then is left (m).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from harness import presets
from methods.hecate import loads as load_model
from methods.hecate.memory_model import Memory, capacity, memory
from methods.hecate.outcome import Result
from methods.hecate.played import EFFICIENCY, PRICED, SYSTEMS, WARM, Array, Held, Options, Setup, follow, play

MODELS = ("gpt-moe-s", "gpt-moe-l", "bert-moe", "bert-moe-deep")
CLUSTERS = {"A": "hecate-a", "B": "hecate-b"}
GPUS = (16, 32)
STEPS = 100  # that count
LAYERS = 4  # simulated; a step has the model's
SKEW = 4.0
RECORDED = "recorded"
ROUTINGS: tuple[float | None, ...] = (SKEW, None)
NOTE = (
    "Simulated from data-sheet rates: no start-up times, computation at 40 % of the device's rate, bw of the paper is "
    "the node's port. Systems decide by all steps' loads; of those that count, behind 100 more, three are priced. "
    "Loads drift (half-life 100 steps); skew is max over mean tokens of an expert at every step and layer. Batches are "
    "the largest that fit all systems but Hecate, which materialises in what memory is left."
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """``cluster``: a key of ``CLUSTERS``; ``skew``: max over mean tokens of an expert at every step and layer, None for
    the recorded trace; ``samples`` of a rank (None: the largest batch of all systems)."""

    model: str
    cluster: str = "A"
    gpus: int = 32
    skew: float | None = SKEW
    samples: int | None = None
    half_life: float = load_model.HALF_LIFE
    steps: int = STEPS
    layers: int = LAYERS
    efficiency: float = EFFICIENCY
    start_s: float = 0.0
    bw_ranks: int = 1
    ports: int = 1  # of a node, which share its rate
    passes_on: bool = False
    at: tuple[int, ...] = PRICED
    seed: int = 0

    @property
    def routing(self) -> str:
        return RECORDED if self.skew is None else f"skew {self.skew:g}"

    def where(self) -> dict[str, object]:
        """Columns of a table that name it."""
        return {"testbed": f"{self.cluster}-{self.gpus}", "routing": self.routing, "model": self.model}

    def with_samples(self) -> Cell:
        return self if self.samples is not None else dataclasses.replace(self, samples=largest_batch(self))


@functools.lru_cache(maxsize=512)
def setup(cell: Cell) -> Setup:
    cluster = presets.cluster(CLUSTERS[cell.cluster])
    name = cell.model if cell.gpus == 32 else f"{cell.model}-e32"
    cell = cell.with_samples()
    assert cell.samples is not None
    on = cluster.resized(cell.gpus // cluster.shape[-1]).with_ports(cell.ports)
    return Setup(presets.model(name), on, cell.samples, cell.efficiency, cell.start_s, cell.bw_ranks, cell.passes_on)


def loads(cell: Cell) -> Array:
    """[steps, layers, W, E] of a cell that states its samples."""
    prices = ("efficiency", "start_s", "bw_ranks", "ports", "passes_on", "at")  # loads do not depend on them
    same = {name: getattr(Cell, name) for name in prices}
    return _loads(dataclasses.replace(cell, **same))


@functools.lru_cache(maxsize=16)
def _loads(cell: Cell) -> Array:
    here = setup(cell)
    shape = (WARM + cell.steps, cell.layers, cell.gpus, here.tokens, here.model)
    if cell.skew is None:
        return load_model.recorded(*shape, seed=cell.seed).astype(np.int64)
    return load_model.drifting(*shape, cell.skew, cell.half_life, cell.seed).astype(np.int64)


def run(cell: Cell, name: str, **changes: object) -> Result:
    """A system, Hecate with as many copies as the memory leaves room for; ``changes``: of its options."""
    return _run(cell.with_samples(), name, tuple(sorted(changes.items())))


@functools.lru_cache(maxsize=1024)
def _run(cell: Cell, name: str, changes: tuple[tuple[str, object], ...]) -> Result:
    options = Options(**dict(changes))  # type: ignore[arg-type]
    here = setup(cell)
    found = play(here, loads(cell), name, options, cell.at)
    if not name.startswith("hecate") or options.m is not None:
        return found
    m = room(cell, found, remat=name == "hecate-rm")  # that was with m = t
    if m >= (here.overlap_degree if options.t is None else options.t) and not options.calibrates:
        return found
    return play(here, loads(cell), name, dataclasses.replace(options, m=m), cell.at)


def room(cell: Cell, found: Result, *, remat: bool) -> int:
    """m of Hecate: copies of a layer that fit beside what ``found`` has without them."""
    here, device = setup(cell), presets.cluster(CLUSTERS[cell.cluster]).device_memory_bytes
    assert device is not None
    bare = memory(here.model, dataclasses.replace(found.copies, resident=0, widest=0), here.samples, found.busiest)
    return capacity(here.model, device - bare.peak, remat=remat)


def planned(cell: Cell, found: Result) -> Memory:
    here = setup(cell)
    return memory(here.model, found.copies, here.samples, found.busiest)


@functools.lru_cache(maxsize=256)
def largest_batch(cell: Cell) -> int:
    """Samples of a rank at which neither EP nor a rival runs out of the device's memory; at least 1."""
    device = presets.cluster(CLUSTERS[cell.cluster]).device_memory_bytes
    assert device is not None

    def fits(samples: int, at: int) -> bool:
        """``samples``, with the copies and the imbalance of ``at`` samples."""
        probe = dataclasses.replace(cell, samples=at, steps=10, layers=2)
        model = setup(probe).model
        found = (_held(probe, name) for name in SYSTEMS if not name.startswith("hecate"))
        return all(memory(model, each.copies, samples, each.busiest).peak <= device for each in found)

    samples = 1
    while fits(samples + 1, 1):
        samples += 1
    while samples > 1 and not fits(samples, samples):  # FasterMoE shadows more as tokens become more
        samples -= 1
    return samples


@functools.lru_cache(maxsize=1024)
def _held(cell: Cell, name: str) -> Held:
    """Of ``run``, without prices."""
    return follow(setup(cell), loads(cell), name, Options(), cell.at)


def everyone(cell: Cell, names: Iterable[str] = tuple(SYSTEMS)) -> dict[str, Result]:
    return {name: run(cell, name) for name in names}


def geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))
