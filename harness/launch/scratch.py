"""Where what is compiled on the way is kept: on this node, not in a home that may be read-only, shared and slow."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from harness.errors import bad

#: variable -> folder of its own below the node's
CACHES = {
    "NUMBA_CACHE_DIR": "numba",
    "TRITON_CACHE_DIR": "triton",
    "TRITON_HOME": "triton-home",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "cache",
}
PROBE_BYTES = 1 << 20


def use_scratch() -> Path:
    """Have all caches of this process, and of those that it starts, below one folder of this user in the node's
    temporary folder, but for those that the user has placed. ``UserError`` if nothing can be written there."""
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
        for variable, name in CACHES.items():
            os.environ.setdefault(variable, str(own / name))
            if os.environ[variable] == str(own / name):
                (own / name).mkdir(exist_ok=True)
    except OSError as error:
        remedy = "free it, or export TMPDIR (in a cluster file: a line of `setup`) as another folder of the node"
        raise bad(f"TMPDIR on {os.uname().nodename}", str(own), f"{error.strerror}; {remedy}") from None
    return own
