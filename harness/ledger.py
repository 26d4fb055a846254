"""Every calibration of every cluster that was profiled: what was fitted, how well, where it holds, and on what.

One JSON file a cluster under ``results/ledger`` of the working directory, one calibration a line, in order of time; of
clusters that it does not know, the ledger that ships with the project does. Calibrations are added and
never changed; a file is written whole or not at all. What a simulator may use of them it gets from
``Calibration.cluster`` and ``Calibration.slowdown``, and no refused fit is among it.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import fcntl
import functools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from harness import outputs, sealed
from harness.comm.fits import Fit, GemmFit, Judged, TokensFit
from harness.errors import UserError, bad
from harness.specs import Cluster, Collective, Gemm, Spec

LEDGER = Path("results/ledger")
SHIPPED = Path(__file__).resolve().parents[1] / LEDGER
SCHEMA_VERSION = 1
LOCK = ".lock"
#: what file systems say that cannot lock, or not for several machines (Lustre without -o flock, some NFS)
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EIO}
_TOLD: contextvars.ContextVar[Calibration | None] = contextvars.ContextVar("told", default=None)
STAND_IN = "stand-in"  # as in harness.bench.contention


class LayerFit(Spec):
    """A system's whole MoE layer over the tokens of one rank, balanced, as a black box."""

    model: str
    dtype: str
    forward: TokensFit
    backward: TokensFit


class Calibration(Spec):
    """What ``moebench profile`` found on one cluster at one time."""

    profiled: Cluster  # as its preset has it; its digest is what the ledger finds it by
    evidence: Literal["measured", "emulated"]
    network: dict[str, Any]
    date: str  # UTC
    provenance: dict[str, Any]  # versions, commit, machine
    foreign_cores: float  # of this machine, that other programs kept busy meanwhile
    duration_s: float | None = None  # of the whole profiling
    fits: dict[str, Fit]  # by operation.level, and operation.flat
    products: dict[str, GemmFit]  # gemm, grouped_gemm
    contention: dict[str, dict[str, float]] = {}  # c[a][b]: what is done on lane a slows down by while b is busy
    contention_spread: dict[str, dict[str, tuple[float, float]]] = {}  # lowest and highest repetition
    layers: dict[str, LayerFit] = {}  # by system

    def fit(self, key: str) -> Judged:
        """The fit of ``operation.scope`` (scopes: the link levels, ``flat``, and the roles ``inter`` for the outermost
        level and ``intra`` for all inside it), of ``gemm`` or of ``grouped_gemm``. Raises ``UserError`` where there is
        none, and where it was refused, with the points."""
        operation, _, scope = key.partition(".")
        found = {**self.fits, **self.products}.get(f"{operation}.{self._level(scope)}" if scope else operation)
        field = f"calibration of {self.profiled.name} ({self.date}): {key}"
        if found is None:
            known = ", ".join([*sorted(self.fits), *self.products])
            raise bad(field, None, f"was not measured; known are {known}")
        if found.refused:
            points = "; ".join(f"{x:.0f}: {'none' if t is None else f'{t * 1e3:.3f} ms'}" for x, t in found.points)
            again = f"profile a quieter machine again ({self.profiled.profile_command})"
            raise UserError(f"{field}: refused, {found.refused}; {again}; the points were {points}")
        return found

    def _level(self, scope: str) -> str:
        levels = [level.name for level in self.profiled.levels]
        if scope == "inter":
            return levels[0]
        if scope == "intra" and len(levels) == 2:
            return levels[1]
        return scope

    def cluster(self, keys: Iterable[str] | None = None) -> Cluster:
        """The profiled cluster with ``collectives`` and ``gemm`` as fitted, keyed as in the presets of real clusters
        (``a2a.inter``, ``ag.intra``, ``gemm``). ``keys``: those wanted; by default every operation's inter and intra,
        and gemm. Raises ``UserError`` if one of them was refused, with the points."""
        if keys is None:
            roles = {role: self._level(role) for role in ("inter", "intra")}
            measured = [key.split(".") for key in self.fits]
            keys = [f"{op}.{role}" for role, level in roles.items() for op, scope in measured if scope == level]
            keys = [*keys, "gemm"]
        fits = {key: self.fit(key) for key in keys}
        as_given = {
            key: Collective(alpha_s=fit.alpha_s, beta_s_per_byte=fit.beta_s_per_byte, r2=fit.r2)
            for key, fit in fits.items()
            if isinstance(fit, Fit)
        }
        product = fits.get("gemm")
        update: dict[str, Any] = {"collectives": as_given}
        if isinstance(product, GemmFit):
            update["gemm"] = Gemm(alpha_s=product.alpha_s, beta_s_per_mac=product.beta_s_per_mac, r2=product.r2)
        return Cluster.model_validate({**self.profiled.model_dump(), **update})

    def slowdown(self, compute: Literal["real", "stand-in"] = "real") -> dict[str, dict[str, float]]:
        """``contention`` among the lanes compute, inter and intra, where tasks of the lane compute really compute, or
        are timed waits: what the simulator takes."""
        left_out, kept = (STAND_IN, "compute") if compute == "real" else ("compute", STAND_IN)
        return {
            "compute" if a == kept else a: {"compute" if b == kept else b: c for b, c in row.items() if b != left_out}
            for a, row in self.contention.items()
            if a != left_out
        }


def record(calibration: Calibration, folder: Path = LEDGER) -> Path:
    """Add ``calibration`` to its cluster's file, which is returned. ``UserError`` if that is damaged, was written by a
    newer moebench, or cannot be written."""
    path = folder / f"{calibration.profiled.name}.json"
    with _locked(folder):
        known = [each.model_dump_json() for each in [*history(calibration.profiled.name, folder), calibration]]
        plain: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "calibrations": [json.loads(each) for each in known]}
        plain |= {sealed.KIND: "calibrations"}
        head = f'{{"schema_version": {SCHEMA_VERSION}, "{sealed.KIND}": "calibrations", '
        head += f'"{sealed.KEY}": "{sealed.digest(plain)}", "calibrations": [\n'
        text = head + ",\n".join(known) + "\n]}\n"
        handle, name = tempfile.mkstemp(prefix=".ledger-", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return path


def check(name: str, folder: Path = LEDGER) -> None:
    """``UserError`` now and not after minutes of measuring, where ``record`` could not add to the clusters of this
    name: the file is damaged or newer, or the folder cannot be written. Nothing is made."""
    history(name, folder)
    outputs.check(folder / f"{name}.json", "ledger", lambda path: True)


def latest(cluster: Cluster, folder: Path = LEDGER) -> Calibration | None:
    """The newest calibration of exactly this cluster (by its digest); None if there is none."""
    for place in places(folder):
        if same := [each for each in history(cluster.name, place) if each.profiled.digest == cluster.digest]:
            return same[-1]
    return None


def places(folder: Path = LEDGER) -> tuple[Path, ...]:
    """Where to look: ``folder``, and behind the one of the working directory what ships."""
    return (folder, SHIPPED) if folder == LEDGER and folder.resolve() != SHIPPED else (folder,)


@contextlib.contextmanager
def telling(calibration: Calibration | None) -> Iterator[None]:
    """Inside, planners are told of ``calibration`` for its cluster; None: of the newest, as for all other clusters."""
    before = _TOLD.set(calibration)
    try:
        yield
    finally:
        _TOLD.reset(before)


def told(cluster: Cluster) -> Calibration | None:
    """What a system's planner may know of ``cluster``: the calibration of the machine that is simulated, else the
    newest."""
    given = _TOLD.get()
    return given if given is not None and given.profiled.digest == cluster.digest else latest(cluster)


def profiled(cluster: Cluster, folder: Path = LEDGER) -> Calibration:
    """``latest``; ``UserError`` if there is none."""
    if (found := latest(cluster, folder)) is None:
        raise bad("cluster", cluster.name, f"was never profiled; {cluster.profile_command}")
    return found


def files(folder: Path = LEDGER) -> list[Path]:
    """Of clusters that were profiled, by name; other files of the folder begin with ``_``."""
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("_"))


def history(name: str, folder: Path = LEDGER) -> list[Calibration]:
    """All calibrations of the clusters of this name, oldest first. ``UserError`` for a damaged file or a newer one."""
    path = folder / f"{name}.json"
    try:
        return list(_read(path, outputs.stamp(path)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise bad("ledger", str(path), f"{error.strerror}; choose a file that can be read") from None


@functools.lru_cache(maxsize=32)
def _read(path: Path, stamp: tuple[int, ...]) -> tuple[Calibration, ...]:
    """As it is since ``stamp``. ``OSError`` where it cannot be read."""
    try:
        data = sealed.unseal(path.read_text(encoding="utf-8"), "calibrations")
        if unknown := data.keys() - {"schema_version", "calibrations"}:
            raise ValueError(f"holds {min(unknown)}")
        version = data["schema_version"]
        if version > SCHEMA_VERSION:
            raise bad(
                "ledger", str(path), f"has schema version {version}, newer than {SCHEMA_VERSION}; update moebench"
            )
        return tuple(Calibration.model_validate(each) for each in data["calibrations"])
    except (OSError, UserError):
        raise
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise bad("ledger", str(path), f"is damaged ({why}); restore it (git checkout) or move it away") from None


def fit_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """Every fit as a row of a table."""
    fits: dict[str, Judged] = {**calibration.fits, **calibration.products}
    for system, layer in calibration.layers.items():
        fits |= {f"{system} forward": layer.forward, f"{system} backward": layer.backward}
    return [
        {
            "operation": name,
            "alpha_s": fit.alpha_s,
            "per x": getattr(fit, fit.RATE),
            "x": fit.RANGE.removeprefix("range_"),
            "from": getattr(fit, fit.RANGE)[0],
            "to": getattr(fit, fit.RANGE)[1],
            "r2": fit.r2,
            "held-out error": fit.held_out_error,
            "refused": fit.refused,
        }
        for name, fit in fits.items()
    ]


def contention_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """Every measured pair of lanes as a row of a table."""
    return [
        {"lane": a, "busy": b, "slowdown": c, "lowest": spread[0], "highest": spread[1]}
        for a, row in calibration.contention.items()
        for b, c in row.items()
        for spread in [calibration.contention_spread[a][b]]
    ]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone with ``folder``, which is made: of two that add at once, both are kept. Where the file system has no locks,
    not alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what is open for writing
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            yield
        finally:
            os.close(handle)
    except OSError as error:
        raise bad("ledger", str(folder), f"{error.strerror}; choose a folder that can be written") from None


__all__ = [
    "LEDGER",
    "SHIPPED",
    "Calibration",
    "LayerFit",
    "contention_rows",
    "files",
    "fit_rows",
    "history",
    "latest",
    "places",
    "record",
    "told",
]
