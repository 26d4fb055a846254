"""Steps 0, 1, 2 and 13: the machine, a job in an allocation, ranks in a session, and NCCL."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from harness import devices
from harness.comm.job import Job
from harness.devices import MASK
from harness.launch import gpus
from tests.gpu.machine import CLUSTER, Machine
from tests.gpu.step import need


def facts(machine: Machine) -> dict[str, Any]:
    """What is here. Wrong is an NVIDIA driver that torch cannot use: everything after it would run on the CPU."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "mask": os.environ.get(MASK),
        "device_files": sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*")),
        "compilers": [name for name in ("gcc", "nvcc") if shutil.which(name)],
        "driver": devices.version(),
        "smi": devices.facts(),
    }
    if machine.emulated:
        return found | machine.unseen("driver, capability, NCCL")
    driver = devices.ask()
    if driver.found and os.environ.get(MASK) not in devices.HIDE_ALL:
        need(torch.cuda.is_available(), f"torch cannot use the GPUs: {'; '.join(gpus.unusable(driver) or ('?',))}")
    device = machine.device
    found |= {
        "device": machine.name,
        "num_devices": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(device)),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
    }
    return found


def allocation(machine: Machine) -> dict[str, Any]:
    """A job inside an allocation has this process's GPUs, under the mask that this process has."""
    from harness.launch.allocation import submit

    _ = machine.device
    kept = os.environ.get(MASK)
    if machine.emulated:  # a mask that is no number
        os.environ[MASK] = "GPU-5a7fa1e5-0000-4000-8000-000000000000"
    try:
        with tempfile.TemporaryDirectory() as folder:
            mask, count = submit(seen, folder=Path(folder), timeout_min=2, name="smoke")
        here = os.environ.get(MASK)
    finally:
        os.environ.pop(MASK, None)
        os.environ |= {} if kept is None else {MASK: kept}
    need(mask == here, f"{MASK} is {mask!r} in the job and {here!r} here")
    if machine.emulated:
        return {"mask": mask} | machine.unseen("how many devices a job sees")
    need(count == torch.cuda.device_count(), f"the job sees {count} devices, this process {torch.cuda.device_count()}")
    need(gpus.suffice(CLUSTER), f"GPUs do not suffice for one rank: {gpus.visible()}")
    return {"mask": mask, "num_devices": count, "visible": list(gpus.visible())}


def seen() -> tuple[str | None, int]:
    """In the job: its mask and how many devices CUDA shows it."""
    return os.environ.get(MASK), torch.cuda.device_count()


def session(machine: Machine) -> dict[str, Any]:
    """A rank of a session is on the GPU, over NCCL, and leaves nothing behind."""
    machine.only_real("ranks over NCCL are processes of their own")
    from harness.launch.session import open_session

    _ = machine.device
    with tempfile.TemporaryDirectory() as folder:
        with open_session(CLUSTER, log_dir=Path(folder)) as opened:
            (found,) = opened.call("tests.gpu.start:place", timeout_s=50)
            evidence = opened.evidence
        left = [child.status() for child in psutil.Process().children(recursive=True)]
    need(found == ("cuda:0", "nccl"), f"the rank is on {found}")
    need(not left, f"{len(left)} processes are left: {left}")
    return {"device": found[0], "backend": found[1], "evidence": evidence}


def place(job: Job, _: Any) -> tuple[str, str]:
    """On a rank."""
    return str(job.device), dist.get_backend()


def nccl(machine: Machine) -> dict[str, Any]:
    """What the harness asks of NCCL, in a world of one: nothing hangs or warns, the group ends."""
    job = machine.job
    need(machine.emulated or dist.get_backend() == "nccl", f"the backend is {dist.get_backend()}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ones = torch.ones(3, device=job.device)
        dist.all_reduce(ones)
        need(ones.tolist() == [1, 1, 1], f"all_reduce of ones gave {ones.tolist()}")
        for count in (0, 3):
            out = torch.zeros(count, device=job.device)
            dist.all_to_all_single(out, ones[:count].contiguous(), [count], [count])
            need(out.tolist() == [1] * count, f"all_to_all_single of {count} ones gave {out.tolist()}")
        gathered: list[Any] = [None]
        dist.gather_object({"rank": job.rank}, gathered)
        listed = ["said"]
        dist.broadcast_object_list(listed, src=0)
        need(gathered == [{"rank": 0}] and listed == ["said"], f"objects came as {gathered} and {listed}")
        dist.barrier()
    machine.leave()
    said = sorted({str(each.message).splitlines()[0] for each in caught})
    need(not [text for text in said if "barrier" in text], f"it warned: {said}")
    return {"warnings": said} | machine.unseen("NCCL: gloo stands in")
