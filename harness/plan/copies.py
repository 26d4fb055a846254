"""Copies of other ranks' experts, held for one batch, and how many bytes of them a rank holds."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch

from harness.comm.handover import Handover
from harness.comm.job import Job
from harness.layer.experts import Experts


class Copies(Handover):
    """Experts that a rank holds for one batch beside its own; ``tensors`` by name [len(ids), ...]."""

    def __init__(self, experts: Experts, ids: np.ndarray, meter: Meter):
        self.ids, self.meter = ids, meter
        own = {name: getattr(experts, name) for name in experts.names}
        self.tensors = {
            name: p.new_empty((len(ids), *p.shape[1:]), requires_grad=torch.is_grad_enabled())
            for name, p in own.items()
        }
        self.sizes = [(t.untyped_storage(), t.untyped_storage().nbytes()) for t in self.tensors.values()]
        self.num_bytes = sum(size for _, size in self.sizes)
        self.here = True
        meter.add(self.num_bytes)

    def release(self) -> None:
        """Let the memory go; the tensors, which autograd has saved, stay and can be filled again."""
        if self.here:
            self.here = False
            for storage, _ in self.sizes:
                storage.resize_(0)
            self.meter.add(-self.num_bytes)

    def restore(self) -> None:
        """Memory again, with nothing in it."""
        self.here = True
        for storage, size in self.sizes:
            storage.resize_(size)
        self.meter.add(self.num_bytes)

    def __del__(self) -> None:
        if self.here:
            self.meter.add(-self.num_bytes)


class Meter:
    """Bytes of the copies that a rank holds now, over all layers, and the most so far."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.now += num_bytes
            self.peak = max(self.peak, self.now)


def meter_of(job: Job) -> Meter:
    """The one of a rank's job."""
    return _meters.setdefault(job, Meter())


_meters: weakref.WeakKeyDictionary[Job, Meter] = weakref.WeakKeyDictionary()
