"""The NVIDIA driver of this machine and its devices: facts alone; ``harness.launch.gpus`` decides what follows.

CUDA itself is asked, in a process of its own: it alone knows what CUDA_VISIBLE_DEVICES means to it (numbers, UUIDs,
MIG, or none), and a process that has initialised CUDA must not fork. Needs the standard library only, since
``make setup`` asks too, before anything is installed: ``python harness/devices.py`` prints the name of the index whose
torch this machine's driver can run, or nothing where PyPI's will do.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "CUDA_VISIBLE_DEVICES"
HIDE_ALL = ("", "-1", "none", "void", "NoDevFiles")  # masks that are there to show nothing
#: the oldest driver that runs what was built with a major version of CUDA (NVIDIA's minor version compatibility)
MIN_DRIVER = {11: 450, 12: 525, 13: 580}
INDEX = {12: "cu126", 13: "cu130"}  # of torch's wheels, by the newest major version of CUDA that a driver supports
OLD_CARDS = (7, 5)  # what CUDA 13 builds no kernels for: capabilities below
ASK_S = 120.0  # eight GPUs without persistence mode take some ten seconds to wake up
SMI_S = 30.0


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU as CUDA names it."""

    name: str
    uuid: str  # of the whole card, also of a MIG slice
    capability: tuple[int, int]
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Driver:
    """``cuda``: the newest version of CUDA that it supports; ``devices``: those that the mask shows, in its order;
    ``error``: why there are none, in CUDA's words."""

    found: bool = False
    cuda: tuple[int, int] | None = None
    devices: tuple[Device, ...] = ()
    error: str = ""


def ask(environment: Mapping[str, str] | None = None) -> Driver:
    """What CUDA says, in this process's environment or another."""
    command = [sys.executable, "-I", "-S", __file__, "ask"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_S, env=environment, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Driver(True, error=f"CUDA did not answer within {ASK_S:g} s")
    try:
        said = json.loads(done.stdout)
    except ValueError:
        return Driver(True, error=f"the process that asked CUDA ended with status {done.returncode}")
    if not said["found"]:
        return Driver(_device_nodes(), error="libcuda.so.1, the driver's library, is not found")
    devices = tuple(Device(name, uuid, (major, minor), size) for name, uuid, major, minor, size in said["devices"])
    return Driver(True, tuple(said["cuda"]), devices, said["error"])


def unmasked() -> dict[str, str]:
    """The environment of this process without its mask, in which CUDA shows every GPU."""
    return {name: value for name, value in os.environ.items() if name != MASK}


def version() -> str | None:
    """Of the driver, as its kernel module states it, also inside of a container; None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"Module\D*?(?:x86_64|aarch64)?\s+(\d+\.[\d.]+)", text)
    return match[1] if match else None


def launch_settings() -> dict[str, float]:
    """What this process's environment does to overlap: whether launches wait for their kernels (they must not where
    lanes overlap), and how many queues feed a device, where that is set."""
    blocking = os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")
    found = {"cuda_launch_blocking": float(blocking)}
    queues = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    return found | ({"cuda_device_max_connections": float(queues)} if queues.isdecimal() else {})


# ------------------------------------------------------------------ nvidia-smi

_FIELDS = (
    "index", "name", "uuid", "driver_version", "compute_cap", "memory.total", "mig.mode.current", "ecc.mode.current",
    "persistence_mode", "compute_mode",
)  # fmt: skip
_CONDITIONS = (
    "uuid", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "clocks.applications.graphics",
    "clocks.applications.memory", "power.draw", "power.limit", "power.default_limit", "temperature.gpu",
    "clocks_event_reasons.active", "clocks_throttle_reasons.active",
)  # fmt: skip


def facts() -> list[dict[str, str]]:
    """Of every GPU that nvidia-smi lists: what does not change during a run."""
    return _query(_FIELDS)


def conditions() -> list[dict[str, str]]:
    """Of every GPU that nvidia-smi lists: clocks (MHz), power (W), temperature (C) and why the clocks are held back
    (a mask of bits, 0 where they are not), now."""
    return _query(_CONDITIONS)


def topology() -> str | None:
    """How GPUs, NICs and cores are joined, as ``nvidia-smi topo -m`` draws it; None without nvidia-smi."""
    said = _smi("topo", "-m")
    return re.sub(r"\x1b\[[0-9;]*m", "", said).strip() if said else None


def _query(fields: tuple[str, ...]) -> list[dict[str, str]]:
    """Without the fields that this nvidia-smi does not know (it refuses them all for one), and what it has no value
    for."""
    known = list(fields)
    while known:
        said = _smi(f"--query-gpu={','.join(known)}", "--format=csv,noheader,nounits")
        if said is None:
            return []
        refused = re.search(r'Field "([^"]+)" is not a valid field', said)
        if refused is None or refused[1] not in known:
            return rows(said, known)
        known.remove(refused[1])
    return []


def rows(csv: str, fields: list[str]) -> list[dict[str, str]]:
    """One mapping a line; ``[N/A]``, ``[Not Supported]`` and the like are left out."""
    found = []
    for line in csv.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(fields):
            pairs = zip(fields, values, strict=True)
            found.append({field: value for field, value in pairs if value and not value.startswith("[")})
    return found


def _smi(*arguments: str) -> str | None:
    """What nvidia-smi prints, also where it refuses; None without it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _device_nodes() -> bool:
    """Whether somebody has given this machine or container a GPU, driver's library or not."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


# ------------------------------------------------------------------ in the process of its own

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def _look() -> dict[str, Any]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"found": False}
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    said: dict[str, Any] = {"found": True, "cuda": divmod(number.value // 10, 100), "devices": [], "error": ""}
    if code := cuda.cuInit(0):
        return said | {"error": _words(cuda, code)}
    cuda.cuDeviceGetCount(ctypes.byref(number))
    for index in range(number.value):
        device, name, uuid, size = ctypes.c_int(), ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)(), _size()
        if code := cuda.cuDeviceGet(ctypes.byref(device), index):
            return said | {"error": _words(cuda, code)}
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceGetUuid(ctypes.byref(uuid), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        capability = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(value.value)
        said["devices"].append([name.value.decode(errors="replace"), _uuid(bytes(uuid)), *capability, size.value])
    return said


_size = ctypes.c_size_t


def _words(cuda: Any, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} (CUDA error {code})"


def _uuid(raw: bytes) -> str:
    """As nvidia-smi writes it."""
    digits = raw.hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def index_for(driver: Driver) -> str:
    """The index whose torch ``driver`` and its cards can run; empty where PyPI's torch can, or nothing is known."""
    if driver.cuda is None:
        return ""
    old = any(device.capability < OLD_CARDS for device in driver.devices)
    return INDEX[12] if driver.cuda[0] < 13 or old else ""


if __name__ == "__main__":
    if sys.argv[1:] == ["ask"]:
        print(json.dumps(_look()))
    else:
        print(index_for(ask(unmasked())))
