"""The steps in their order: what the later ones lean on comes first."""

from __future__ import annotations

from typing import Any

from tests.gpu.step import Step

STEPS = (
    Step(0, "facts", 20, "tests.gpu.start:facts"),
    Step(1, "allocation", 30, "tests.gpu.start:allocation"),
    Step(2, "session", 60, "tests.gpu.start:session"),
    Step(3, "conformance", 60, "tests.gpu.numbers:conformance"),
    Step(4, "grouped products", 30, "tests.gpu.numbers:grouped_products"),
    Step(5, "rows", 15, "tests.gpu.numbers:rows"),
    Step(6, "memory across streams", 60, "tests.gpu.streams:memory"),
    Step(7, "executor", 40, "tests.gpu.streams:executor_"),
    Step(8, "sanitizer", 60, "tests.gpu.streams:sanitizer", alone=True),
    Step(9, "races", 90, "tests.gpu.races:races"),
    Step(10, "rates", 60, "tests.gpu.rates:rates"),
    Step(11, "out of memory", 30, "tests.gpu.races:out_of_memory", alone=True),
    Step(12, "real packages", 60, "tests.gpu.races:packages"),
    Step(13, "nccl", 20, "tests.gpu.start:nccl", alone=True),
)


def machine(emulated: bool) -> Any:
    """What every step gets; made once a process, before the first step's time begins."""
    from tests.gpu.machine import Machine

    return Machine(emulated)
