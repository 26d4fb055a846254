"""Clusters of the GPUs of this machine, which no file can describe beforehand: ``one-gpu`` and ``gpu-node``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Iterator

import yaml

from harness import devices, mask
from harness.errors import bad
from harness.specs import Cluster

#: by name: how many GPUs, the most that are there
SIZES = {"one-gpu": (1,), "gpu-node": (8, 4, 2)}
_REMEDY = "name another, or plan for another machine (moebench run --dry-run --gpus 8)"
ANY_GPU = devices.Device("gpu", "", (0, 0), 0)  # whatever card it is


@dataclasses.dataclass(frozen=True)
class DataSheet:
    """Of one device; None where it is not known."""

    pattern: str  # of the name that CUDA gives it
    flops_per_s: float | None = None  # bfloat16, dense
    bytes_per_s: float | None = None  # of its memory
    link_bytes_per_s: float | None = None  # to the others of its node, one direction


def cluster(name: str) -> Cluster:
    """One node with the GPUs that are here; ``UserError`` where there are too few, or several kinds."""
    found = _gpus()
    size = next((size for size in SIZES[name] if size <= len(found)), None)
    if size is None:
        driver = devices.Driver() if assumed() else devices.ask()
        mask.check(driver)
        why = f" ({driver.error})" if driver.found and not found and driver.error else ""
        wanted = "at least 1 GPU" if name == "one-gpu" else f"{SIZES[name][-1]} to {SIZES[name][0]} GPUs"
        raise bad("cluster", name, f"is {wanted} of this machine, which has {len(found)}{why}; {_REMEDY}")
    kinds = sorted({device.name for device in found[:size]})
    if len(kinds) > 1:
        remedy = f"set {devices.MASK} to GPUs of one kind"
        raise bad("cluster", name, f"needs equal GPUs, but the first {size} here are {', '.join(kinds)}; {remedy}")
    sheet = data_sheet(kinds[0])
    described: Cluster = Cluster.parse(
        {
            "name": name if size == 1 else f"{name}-{size}",
            "kind": "physical",
            "levels": [
                {"name": "node", "size": 1},
                {"name": "gpu", "size": size, "bandwidth_bytes_per_s": sheet.link_bytes_per_s if size > 1 else None},
            ],
            "device": kinds[0],
            "device_flops_per_s": sheet.flops_per_s,
            "device_bytes_per_s": sheet.bytes_per_s,
            "device_memory_bytes": min(device.memory_bytes for device in found[:size]) or None,
            "source": f"this machine: {size} x {kinds[0]}; rates from the vendor's data sheet where it is known.",
            "interpretation": "Rates are of bfloat16, dense; a link's of one direction.",
        },
        f"cluster {name}",
    )
    _made.add(described.digest)
    return described


def made(found: Cluster) -> bool:
    """Whether ``found`` is a cluster of this machine's GPUs, and not a published one."""
    return found.digest in _made


_made: set[str] = set()


def data_sheet(device: str) -> DataSheet:
    """Of the device that CUDA calls so; without any rate where it is not known."""
    known = (sheet for sheet in data_sheets().values() if re.search(sheet.pattern, device) and "MIG" not in device)
    return next(known, DataSheet(""))


def num_gpus() -> int:
    """Those that are here."""
    return len(_gpus())


def assumed() -> bool:
    """Whether they are only supposed to be here."""
    return _assumed is not None


@contextlib.contextmanager
def assuming(num_gpus: int) -> Iterator[None]:
    """As if this machine had so many GPUs, of no particular kind: to plan on another one."""
    global _assumed
    before, _assumed = _assumed, (ANY_GPU,) * num_gpus
    try:
        yield
    finally:
        _assumed = before


_assumed: tuple[devices.Device, ...] | None = None


def _gpus() -> tuple[devices.Device, ...]:
    return _asked() if _assumed is None else _assumed


@functools.cache
def _asked() -> tuple[devices.Device, ...]:
    return devices.ask().devices


@functools.cache
def data_sheets() -> dict[str, DataSheet]:
    text = (importlib.resources.files(__package__) / "devices.yaml").read_text("utf-8")
    return {name: DataSheet(**fields) for name, fields in yaml.safe_load(text).items()}
