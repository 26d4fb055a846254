"""Steps that fail, hang, die and lack something, to see what the smoke says of them."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from tests.gpu.step import Skip, Step


def machine(emulated: bool) -> None:
    """None is needed."""


def works(_: Any) -> dict[str, Any]:
    return {"process": os.getpid()}


def fails(_: Any) -> dict[str, Any]:
    raise ZeroDivisionError("by nothing")


def hangs(_: Any) -> dict[str, Any]:
    time.sleep(1000)
    return {}


def dies(_: Any) -> dict[str, Any]:
    os.abort()


def lacks(_: Any) -> dict[str, Any]:
    raise Skip("no such thing here")


def lacks_a_package(_: Any) -> dict[str, Any]:
    importlib.import_module("a_package_that_nobody_has")
    return {}


TARGETS = (works, fails, works, hangs, dies, lacks, lacks_a_package, works)
STEPS = tuple(
    Step(number, target.__name__.replace("_", " "), 0.5 if target is hangs else 20, f"{__name__}:{target.__name__}")
    for number, target in enumerate(TARGETS)
)
