"""What a step of the smoke is. Standard library only: where a package is missing, its steps are skipped by name."""

from __future__ import annotations

import dataclasses
import importlib
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = ("harness", "baselines", "methods", "tests")


class Skip(Exception):
    """This step cannot be done here; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Step:
    """``target``, "module:function", takes the machine (``tests.gpu.machine``) and returns figures by name. It raises
    ``Skip``, or anything else where the machine or moebench is wrong. ``alone``: in a process of its own."""

    number: int
    name: str
    box_s: float  # what runs longer is ended
    target: str
    alone: bool = False


def do(step: Step, machine: Any) -> dict[str, Any]:
    """The step's line without its times: step, name, status (ok, failed, skipped), reason, figures."""
    line: dict[str, Any] = {"step": step.number, "name": step.name, "status": "ok", "reason": ""}
    try:
        module, function = step.target.split(":")
        line |= getattr(importlib.import_module(module), function)(machine)
    except Skip as reason:
        line |= {"status": "skipped", "reason": str(reason)}
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OURS:
            line |= failed(error)
        else:
            line |= {"status": "skipped", "reason": f"package {error.name} is not installed"}
    except Exception as error:
        line |= failed(error)
    return line


def failed(error: Exception) -> dict[str, str]:
    """Status and reason of a step that raised, with the last line of ours that it was in."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(f"{ROOT}/")]
    own = [each for each in frames if "/.venv/" not in each.filename and each.filename != __file__]
    where = f" ({own[-1].filename.removeprefix(f'{ROOT}/')}:{own[-1].lineno})" if own else ""
    return {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split()) + where}


def need(condition: object, otherwise: str) -> None:
    """The step fails unless ``condition`` holds."""
    if not condition:
        raise AssertionError(otherwise)
