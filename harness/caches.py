"""Where libraries keep what they compile or draw, and where else if the home folder cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import harness
from harness.errors import bad

_HOME_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
#: variable that moves a cache -> the places that its library takes without it, the first that can be written
CACHES: dict[str, tuple[Path, ...]] = {
    "NUMBA_CACHE_DIR": (Path(harness.__file__).parents[1] / "methods", _HOME_CACHE),
    "TRITON_CACHE_DIR": (Path("~/.triton"),),
    "MPLCONFIGDIR": (Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config"),),
    "IPYTHONDIR": (Path("~/.ipython"),),
    "JUPYTER_RUNTIME_DIR": (Path("~/.local/share"),),
}


def without_a_place() -> list[str]:
    """Variables of the caches that cannot be written where they are, and that nobody has moved."""
    return [name for name, places in CACHES.items() if not os.environ.get(name) and not any(map(_writable, places))]


def not_writable() -> dict[str, str]:
    """Variables whose folder, named by the user, cannot be written."""
    named = {name: os.environ[name] for name in CACHES if os.environ.get(name)}
    return {name: folder for name, folder in named.items() if not _writable(Path(folder))}


def use_scratch() -> list[str]:
    """Move the caches that have no place into the scratch folder (TMPDIR), for this process and all that it starts."""
    moved = without_a_place()
    try:
        for name in moved:
            folder = Path(tempfile.gettempdir()) / f"moebench-caches-{os.getuid()}" / name.lower()
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[name] = str(folder)
    except OSError as error:
        value = os.environ.get("TMPDIR", "/tmp")
        raise bad("TMPDIR", value, f"{error.strerror}; neither it nor the home folder can be written") from None
    return moved


def _writable(folder: Path) -> bool:
    """Whether files can be made there, or the folder itself where it is not there yet."""
    folder = folder.expanduser().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
