"""A copy of the code as it is at submission: what a job runs an hour or a week later is what was submitted."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from harness.bench import provenance
from harness.registry import FOLDERS
from harness.routing.make import file_of
from harness.routing.trace import find_trace
from harness.specs import Workload
from harness.sweep.spec import ROOT

#: folders of the repository that a job needs
KEPT = ("harness", "baselines", "methods", "results/ledger", "results/traces")


def freeze(target: Path, workloads: list[Workload]) -> None:
    """Copy the code, the calibrations and the files that ``workloads`` read to ``target``, whole or not at all."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in _files():
        copy = partial / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    for path in {path for each in workloads if (path := file_of(each)) is not None}:
        source = find_trace(path)
        if not Path(path).expanduser().is_absolute() and not (partial / "results" / "traces" / path).exists():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, partial / path)
    (partial / provenance.FROZEN.name).write_text(json.dumps(provenance.git_state()))
    partial.rename(target)


def _files() -> list[str]:
    """Of ``KEPT``: what git tracks or would track, and all code of systems; without git, everything but caches."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z", *KEPT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        known = {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
        # A file of systems is found by standing there, and so is one that git is told to leave alone.
        code = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
        return sorted(known | {str(path.relative_to(ROOT)) for path in code})
    found = (path for folder in KEPT for path in (ROOT / folder).rglob("*") if path.is_file())
    return [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]
