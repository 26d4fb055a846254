"""The GPUs of this machine, found without initialising CUDA, which would forbid to fork."""

from __future__ import annotations

import os
from pathlib import Path

from harness.errors import bad
from harness.specs import Cluster


def visible() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    present = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present or allowed is None:
        return present
    return [name.strip() for name in allowed.split(",") if name.strip()]


def suffice(cluster: Cluster) -> bool:
    """Whether every rank of ``cluster`` can have one of its own; ``UserError`` if a physical one's cannot."""
    num_gpus = len(visible())
    if cluster.kind == "physical" and num_gpus < cluster.num_ranks:
        raise bad(
            f"cluster {cluster.name}.kind",
            "physical",
            f"needs {cluster.num_ranks} GPUs on this machine, which has {num_gpus}; choose a local or emulated cluster",
        )
    if cluster.kind == "emulated" or num_gpus < cluster.num_ranks:
        return False
    import torch

    return torch.version.cuda is not None
