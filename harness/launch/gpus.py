"""Which device a rank computes on. A cluster gets the devices that it names, or one line says why it cannot.

physical    the GPU that ``device`` names, one a rank; ``device: cpu`` is the CPU
local       a GPU a rank where this machine has as many and torch can use them, else the CPU, said in a warning
            where there are GPUs; where ``device`` names a GPU, that one or nothing
emulated    the CPU
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING

from harness import devices, mask
from harness.devices import HIDE_ALL, INDEX, MASK, MIN_DRIVER, Driver
from harness.errors import UserError, bad
from harness.specs import Cluster

if TYPE_CHECKING:
    import torch

log = logging.getLogger("moebench")


def suffice(cluster: Cluster) -> bool:
    """Whether the ranks of ``cluster``, all on this machine, run on its GPUs; ``UserError`` if they should and cannot.

    Does not initialise CUDA here, which would forbid to fork.
    """
    if cluster.kind == "emulated":
        return False
    driver = devices.ask()
    mask.check(driver)
    why = unusable(driver)
    num_gpus = 0 if why else len(driver.devices)
    if num_gpus < cluster.num_ranks:
        if cluster.kind == "physical" or _names_gpu(cluster):
            raise _too_few(cluster, cluster.num_ranks, num_gpus, why)
        if driver.found and os.environ.get(MASK) not in HIDE_ALL:
            reason = "; ".join(why) if why else f"{cluster.num_ranks} ranks, {num_gpus} GPUs"
            log.warning("cluster %s runs on the CPU: %s", cluster.name, reason)
        return False
    for device in driver.devices[: cluster.num_ranks]:
        _check_name(cluster, device.name)
    return True


def visible() -> list[str]:
    """Names of the GPUs that CUDA shows to this process, in its order."""
    return [device.name for device in devices.ask().devices]


def device_of(cluster: Cluster, local_rank: int, num_local: int, use_cuda: bool | None = None) -> torch.device:
    """The device of a rank, ``local_rank`` of the ``num_local`` that share this machine; torch's current one from now
    on. ``use_cuda``: what has been decided already; None: what ``cluster`` names. ``UserError`` if that is not here."""
    import torch

    if use_cuda is None:
        use_cuda = cluster.kind != "emulated" and _names_gpu(cluster)
    if not use_cuda:
        os.environ[MASK] = ""  # for packages too, which look for GPUs by themselves
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    own = num_gpus == 1 and (not given.isdecimal() or int(given) >= num_local)  # Slurm has bound one to every task
    if num_gpus < num_local and not own:
        driver = devices.ask()
        mask.check(driver)
        raise _too_few(cluster, num_local, num_gpus, unusable(driver))
    # Lanes have communicators of their own; ranks use them in one order, and NCCL (2.26 and later) then keeps to it.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    device = torch.device("cuda", local_rank if num_gpus > 1 else 0)
    _check_name(cluster, torch.cuda.get_device_name(device))
    torch.cuda.set_device(device)
    return device


def unusable(driver: Driver) -> tuple[str, str] | None:
    """Why torch can use none of the GPUs, and what helps; None if it can."""
    if not driver.found:
        return "there is no NVIDIA driver", ""
    if driver.cuda is None:
        return driver.error, "install the driver, or start the container with its GPUs (--gpus all, --nv)"
    import torch

    newest = "{}.{}".format(*driver.cuda)
    build, other = torch.version.cuda, f"make setup TORCH_INDEX={INDEX.get(driver.cuda[0], INDEX[max(INDEX)])}"
    if build is None:
        return f"torch {torch.__version__} is a CPU build, the driver is one for CUDA {newest}", other
    major = int(build.split(".")[0])
    if driver.cuda[0] < major:
        what = f"torch {torch.__version__} is built for CUDA {build}, the driver supports {newest} at most"
        return what, f"{other}, or a driver >= {MIN_DRIVER[major]}" if major in MIN_DRIVER else other
    if not driver.devices:
        return driver.error or f"{MASK} hides every GPU", f"nvidia-smi must list GPUs, and {MASK} name some of them"
    kernels = torch.cuda.get_arch_list()
    for device in driver.devices:
        if kernels and not _has_kernels(device.capability, kernels):
            what = "torch {} has no kernels for {}, capability {}.{}"
            helps = f"make setup TORCH_INDEX={INDEX[12]}"
            return what.format(torch.__version__, device.name, *device.capability), helps
    return None


def same_card(named: str, found: str) -> bool:
    """Whether ``found``, as CUDA calls it, can be what a cluster calls ``named``: every word of the name is there, and
    form (SXM, PCIe, NVL) and memory do not differ where both state them. ``gpu`` and ``cuda`` are any card."""
    wanted, here = _words(named), _words(found)
    if "mig" in here and "mig" not in wanted:
        return False  # a slice of the card
    for kind in (_FORM, _MEMORY):
        both = [{kind.sub(r"\1", word) for word in words if kind.fullmatch(word)} for words in (wanted, here)]
        if all(both) and not both[0] & both[1]:
            return False
    return {word for word in wanted if not _FORM.fullmatch(word) and not _MEMORY.fullmatch(word)} <= here


_FORM = re.compile(r"(sxm|pcie|nvl)\d*")
_MEMORY = re.compile(r"(\d+)gb")
_VENDOR = {"nvidia", "gpu", "cuda", "tesla", "geforce", "quadro"}


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9.]+", re.sub(r"(\d)\s+gb\b", r"\1gb", name.lower()))) - _VENDOR


def _names_gpu(cluster: Cluster) -> bool:
    return cluster.device.lower() != "cpu"


def _check_name(cluster: Cluster, found: str) -> None:
    field = f"cluster {cluster.name}.device"
    if not _names_gpu(cluster):
        if cluster.kind == "physical":
            raise bad(field, cluster.device, f"the GPUs here are {found}; name them so, or write kind: local")
    elif not same_card(cluster.device, found):
        raise bad(field, cluster.device, f"the GPU here is {found}; name that one, with its rates, or run elsewhere")


def _too_few(cluster: Cluster, num_ranks: int, num_gpus: int, why: tuple[str, str] | None) -> UserError:
    remedy = "choose a cluster of device: cpu" if cluster.kind == "local" else "choose a local or emulated cluster"
    remedy = "ask for as many GPUs as ranks" if "SLURM_JOB_ID" in os.environ else remedy
    here = f"needs {num_ranks} GPUs on this machine, which has {num_gpus}"
    if why:
        what, helps = why
        here, remedy = f"{here} that torch can use: {what}", f"{helps}; or {remedy}" if helps else remedy
    field, value = ("device", cluster.device) if cluster.kind == "local" else ("kind", cluster.kind)
    return bad(f"cluster {cluster.name}.{field}", value, f"{here}; {remedy}")


def _has_kernels(capability: tuple[int, int], kernels: list[str]) -> bool:
    """A binary serves its major version from its minor on; PTX (compute_) everything from its version on."""
    for name in kernels:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if match:
            built = int(match[2]), int(match[3])
            if match[1] == "sm" and built[0] == capability[0] and built <= capability:
                return True
            if match[1] == "compute" and built <= capability:
                return True
    return False
