"""CUDA_VISIBLE_DEVICES: CUDA drops a part that names no device, and all after it, in silence; moebench does not."""

from __future__ import annotations

import os

from harness import devices
from harness.errors import bad


def check(driver: devices.Driver) -> None:
    """``UserError`` unless every part names a device. ``driver``: as this process sees it."""
    mask = os.environ.get(devices.MASK)
    if mask is None or driver.cuda is None or mask.strip() in devices.HIDE_ALL:
        return
    parts = [part.strip() for part in mask.split(",")]
    named = parts[: next((at for at, part in enumerate(parts) if part.startswith("-")), len(parts))]
    if len(driver.devices) >= len(named):
        return
    everything = devices.ask(devices.unmasked())
    if not everything.devices:
        return  # not the mask's fault
    number = len(everything.devices)
    numbers = "0" if number == 1 else f"0 to {number - 1}"
    raise bad(
        devices.MASK,
        mask,
        f"{named[len(driver.devices)]!r} names no device that CUDA can show; unset it, or name some of {numbers} "
        "or of the UUIDs that nvidia-smi -L lists, each once",
    )
