"""Base and head in turns: B H H B, race after race, each in processes and sessions of its own, which start anew now and
then: what is of a session and not of the code must not look like the code."""

from __future__ import annotations

import contextlib
import importlib.resources
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import outputs, sealed
from harness.bench import provenance, suite
from harness.errors import Failure, bad, unknown
from harness.launch import gpus, last_words, scratch
from harness.regress import decide, side

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference"
NUM_SESSIONS = 4
TIMES = ("race", "system", "direction", "pair", "head_s")  # of a reference
Say = Callable[[str], None]


def suites() -> dict[str, Path]:
    """Small sets of experiments for this purpose, by name."""
    folder = Path(str(importlib.resources.files("harness.presets"))) / "regress"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def suite_file(name: str) -> Path:
    """Of a name or a path."""
    if name.endswith((".yaml", ".yml")):
        return Path(name).resolve()
    if name not in suites():
        raise unknown("--suite", name, suites(), "suites")
    return suites()[name]


def check_suite(path: Path) -> tuple[suite.Race, ...]:
    """Its races; ``UserError`` for a file that is not one, and for GPUs that are not here."""
    races = suite.load(path).races
    for race in races:
        gpus.suffice(race.first.cluster)
    return races


@contextlib.contextmanager
def checkout(what: str) -> Iterator[Path]:
    """The folder of a checkout: given as one, or a revision that is checked out for as long as it is needed."""
    if Path(what).is_dir():
        if not (Path(what) / "harness").is_dir():
            raise bad("checkout", what, "holds no moebench; name a checkout of it, or a revision")
        yield Path(what).resolve()
        return
    with scratch.folder("base") as folder:
        target = folder / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "prune"], capture_output=True)  # those of comparisons that were killed
        done = subprocess.run([*git, "add", "--detach", str(target), what], capture_output=True, text=True)
        if done.returncode:
            raise bad("checkout", what, f"is neither a folder nor a revision ({done.stderr.strip().splitlines()[-1]})")
        try:
            yield target
        finally:
            subprocess.run([*git, "remove", "--force", str(target)], capture_output=True)


class Side:
    """A running ``harness.regress.side`` with the code of ``root``."""

    def __init__(self, root: Path, suite_path: Path, log_dir: Path):
        environment = os.environ | {"PYTHONPATH": str(root)}
        log_dir.mkdir(parents=True, exist_ok=True)
        with (log_dir / "side.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, side.__file__, str(suite_path), str(log_dir)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=root, env=environment, text=True,
            )  # fmt: skip
        self._log = log_dir / "side.log"

    def run(self, race: int) -> dict[str, Any]:
        """Times of one visit to race number ``race``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{race}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            said = last_words.line(self._log)
            raise Failure(f"a side of the comparison has ended: {said or 'without a word'} (log: {self._log})")
        return dict(json.loads(line))

    def close(self) -> None:
        """End it, its sessions and their ranks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.wait()


def race_pairs(
    base: Path, head: Path, suite_path: Path, num_pairs: int, log_dir: Path, say: Say
) -> tuple[pd.DataFrame, list[str]]:
    """Visits in the order B H H B -> ``decide.KEYS``, session, pair, base_s, head_s; and what could not be compared,
    and why."""
    races = check_suite(suite_path)
    rows: list[dict[str, Any]] = []
    setbacks: dict[str, str] = {}
    for session, pairs in enumerate(np.array_split(np.arange(num_pairs), NUM_SESSIONS)):
        with contextlib.ExitStack() as stack:
            sides = [
                stack.enter_context(contextlib.closing(Side(root, suite_path, log_dir / f"{name}-{session}")))
                for root, name in ((base, "base"), (head, "head"))
            ]
            for index, race in enumerate(races):
                name = describe(race)
                for pair in pairs:
                    say(f"session {session + 1} of {NUM_SESSIONS}: {name}: pair {pair + 1} of {num_pairs}")
                    found: list[dict[str, Any]] = [{}, {}]
                    for which in (0, 1) if pair % 2 == 0 else (1, 0):
                        found[which] = sides[which].run(index)
                    for whose, answer in zip(("base", "head"), found, strict=True):
                        if "error" in answer:
                            _note(setbacks, f"{name}: {whose}: {answer['error']}")
                    if any("error" in answer for answer in found):
                        break
                    rows += [{"session": session, "pair": pair, **row} for row in _rows(race, found, setbacks)]
    return pd.DataFrame(rows, columns=[*decide.KEYS, "session", "pair", "base_s", "head_s"]), list(setbacks.values())


def describe(race: suite.Race) -> str:
    """Its name in tables."""
    return f"{race.first.phase} {race.first.model.name} {race.first.workload.name} {race.first.cluster.name}"


def _note(setbacks: dict[str, str], words: str) -> None:
    """Once for what differs only in its numbers and its log, as from session to session."""
    setbacks.setdefault(re.sub(r"\(log: [^)]*\)|\d+", "", words), words)


def _rows(race: suite.Race, found: list[dict[str, Any]], setbacks: dict[str, str]) -> list[dict[str, Any]]:
    rows, name = [], describe(race)
    for cell, experiment in enumerate(race.experiments):
        base, head = (answer["cells"][cell] for answer in found)
        for which, outcome in (("base", base), ("head", head)):
            if outcome["status"] != "ok":
                words = f"{experiment.system} {outcome['status']}: {outcome['reason']}"
                _note(setbacks, f"{name}: {which}: {words}")
        for direction in set(base["times_s"]) & set(head["times_s"]):
            times = {f"{k}_s": float(np.median(v["times_s"][direction])) for k, v in (("base", base), ("head", head))}
            rows.append({"race": name, "system": experiment.system, "direction": direction, **times})
    return sorted(rows, key=lambda row: (row["system"], row["direction"] != "forward"))


def machine() -> str:
    """What a stored reference holds for: processor and cores, or the GPU."""
    device = next(iter(gpus.visible()), provenance.cpu_model())
    return f"{device}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}"


def check_reference(name: str) -> None:
    """``UserError`` if ``write_reference`` could not write, or would replace what is no reference."""
    outputs.check(REFERENCE / f"{name}.json", "reference", outputs.starts_with(b'"machine"'))


def write_reference(pairs: pd.DataFrame, name: str) -> Path:
    """Keep the head's times as the reference of this suite and machine."""
    path = REFERENCE / f"{name}.json"
    times = pairs[[*TIMES]].to_dict("records")
    kept = {"machine": machine(), "git": provenance.git_state(), "times": times}
    outputs.write(path, sealed.seal(kept, "reference", indent=1), "reference")
    return path


def read_reference(name: str) -> pd.DataFrame:
    """Times of the stored reference, ``TIMES``; ``UserError`` if there is none, or none of this machine."""
    path, again = REFERENCE / f"{name}.json", "make one with moebench regress --save-reference"
    if not path.exists():
        raise bad("reference", str(path), f"there is none; {again}")
    try:
        stored = sealed.unseal(path.read_text(encoding="utf-8"), "reference")
        made_on, times = stored["machine"], pd.DataFrame(stored["times"], columns=[*TIMES])
        times["head_s"] = times["head_s"].astype(float)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad("reference", str(path), f"cannot be read ({type(error).__name__}: {error}); {again}") from None
    if made_on != machine():
        raise bad("reference", made_on, f"was made on another machine than this ({machine()}); use --base")
    return times


def against_reference(
    head: Path, name: str, suite_path: Path, num_pairs: int, log_dir: Path, say: Say
) -> tuple[pd.DataFrame, list[str]]:
    """The head's visits beside the stored ones in order: no common drift is cancelled, so differences are larger."""
    then = read_reference(name).rename(columns={"head_s": "then_s"})
    pairs, setbacks = race_pairs(head, head, suite_path, num_pairs, log_dir, say)
    joined = pairs.merge(then, on=["race", "system", "direction", "pair"])
    joined["base_s"] = joined.pop("then_s")
    return joined, setbacks


def own_folder(results: Path) -> Path:
    """A new one for the logs of both sides and for the tables; none that is there is touched."""
    for number in itertools.count():
        folder = results / "regress" / (time.strftime("%Y%m%d-%H%M%S") + (f"-{number}" if number else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise bad("--results", str(results), f"{folder} is in the way; choose another folder") from None
            continue
        except OSError as error:
            raise outputs.unwritable(folder, error, "--results") from None
        return folder
    raise AssertionError
