"""Real text that every Python has: the sources and documentation topics of its standard library, as bytes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import sysconfig
import zlib
from pathlib import Path

import numpy as np

from harness.errors import bad

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "turtledemo"}
HELD_OUT_EVERY = 16  # one file in so many is never trained on


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes as tokens of a vocabulary of 256."""

    train: np.ndarray  # uint8
    held: np.ndarray  # uint8, from files that are not in train
    description: str

    def sample(self, rng: np.random.Generator, num: int, length: int) -> np.ndarray:
        """``num`` random windows of the training bytes, int64 [num, length]."""
        starts = rng.integers(0, len(self.train) - length, num)
        return self.train[starts[:, None] + np.arange(length)].astype(np.int64)

    def held_windows(self, num: int, length: int) -> np.ndarray:
        """The same ``num`` windows always, evenly over the held-out bytes, int64 [num, length]."""
        starts = np.linspace(0, len(self.held) - length, num).astype(np.int64)
        return self.held[starts[:, None] + np.arange(length)].astype(np.int64)


@functools.cache
def python_corpus() -> Corpus:
    """Every *.py file of the standard library but its tests (the documentation topics of ``pydoc`` are one of
    them), and the licence."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not EXCLUDED.intersection(path.relative_to(root).parts)]
    paths += [path for path in root.glob("LICENSE*") if path.is_file()]
    if not paths:
        raise bad("corpus", str(root), "this Python ships no sources of its standard library; use one that does")
    train: list[bytes] = []
    held: list[bytes] = []
    digest = hashlib.sha256()
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_bytes()
        except OSError:
            continue
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
        (train if zlib.crc32(name.encode()) % HELD_OUT_EVERY else held).append(text)
    train_bytes, held_bytes = b"".join(train), b"".join(held)
    description = (
        f"Python {platform.python_version()} standard library (sources, documentation topics, licence) as bytes: "
        f"{len(train)} files, {len(train_bytes)} bytes to train on; {len(held)} files, {len(held_bytes)} bytes "
        f"held out; sha256 {digest.hexdigest()[:16]}"
    )
    return Corpus(np.frombuffer(train_bytes, np.uint8), np.frombuffer(held_bytes, np.uint8), description)
