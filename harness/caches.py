"""Where libraries keep what they compile or draw, and how that moves to the scratch folder of the machine (TMPDIR):
on a cluster's node always, since its home may be read-only, shared and slow; elsewhere where it has no place."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import harness
from harness.errors import bad

_HOME_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
PROBE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Cache:
    """``folder``: its name below the scratch folder; ``places``: those that its library takes where no variable names
    another one, the first that can be written; none if it is made only when it is needed."""

    folder: str
    places: tuple[Path, ...] = ()


CACHES = {
    "NUMBA_CACHE_DIR": Cache("numba", (Path(harness.__file__).parents[1] / "methods", _HOME_CACHE)),
    "TRITON_CACHE_DIR": Cache("triton", (Path("~/.triton"),)),
    "TRITON_HOME": Cache("triton-home"),
    "TORCHINDUCTOR_CACHE_DIR": Cache("inductor"),
    "TORCH_EXTENSIONS_DIR": Cache("torch-extensions", (_HOME_CACHE,)),
    "CUDA_CACHE_PATH": Cache("cuda", (Path("~/.nv"),)),
    "MPLCONFIGDIR": Cache("matplotlib", (Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config"),)),
    "IPYTHONDIR": Cache("ipython", (Path("~/.ipython"),)),
    "JUPYTER_RUNTIME_DIR": Cache("jupyter", (Path("~/.local/share"),)),
    "XDG_CACHE_HOME": Cache("cache"),
}


def without_a_place() -> list[str]:
    """Variables of the caches that cannot be written where they are, and that nobody has moved."""
    return [
        name
        for name, cache in CACHES.items()
        if cache.places and not os.environ.get(name) and not any(map(_writable, cache.places))
    ]


def not_writable() -> dict[str, str]:
    """Variables whose folder, named by the user, cannot be written."""
    named = {name: os.environ[name] for name in CACHES if os.environ.get(name)}
    return {name: folder for name, folder in named.items() if not _writable(Path(folder))}


def use_scratch(everything: bool = False) -> list[str]:
    """Move the caches that have no place, or all, into a folder of this user's in the scratch folder, for this process
    and all that it starts; those that the user has placed stay. Returns the variables of those that were moved.
    ``UserError`` if nothing can be written there."""
    moved = [name for name in CACHES if not os.environ.get(name)] if everything else without_a_place()
    if not moved:
        return moved
    given = Path(os.environ.get("TMPDIR", "/tmp"))
    own = (given if given.is_dir() else Path("/tmp")) / f"moebench-caches-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        if own.is_symlink() or own.stat().st_uid != os.getuid():  # compiled code is run: only one's own
            raise PermissionError(0, "belongs to somebody else")
        with tempfile.TemporaryFile(dir=own) as probe:
            probe.write(b"\0" * PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
        for name in moved:
            folder = own / CACHES[name].folder
            folder.mkdir(exist_ok=True)
            os.environ[name] = str(folder)
    except OSError as error:
        remedy = "free it, or export TMPDIR (in a cluster file: a line of `setup`) as another folder of this machine"
        raise bad(f"TMPDIR on {os.uname().nodename}", str(own), f"{error.strerror}; {remedy}") from None
    return moved


def _writable(folder: Path) -> bool:
    """Whether files can be made there, or the folder itself where it is not there yet."""
    folder = folder.expanduser().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
