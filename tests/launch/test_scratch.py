"""Temporary folders: gone at the end, or, where their process was killed, when the next one comes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from harness.launch import last_words, scratch

ROOT = Path(__file__).parents[2]
HOLD = """
import time
from harness.launch import last_words, scratch
made = scratch.Folder("check")
print(made.path, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def old(path: Path, age_s: float = 3600) -> None:
    os.utime(path, (time.time() - age_s,) * 2)


def test_what_a_killed_process_has_left_is_swept_and_nothing_else(temporary: Path) -> None:
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        (left / "phases").touch()
        for name in ("moebench-caches-0", "moebench-by-hand", "theirs"):
            (temporary / name).mkdir()
            old(temporary / name)
        old(left)
        scratch.sweep()
        assert left.exists()  # its process lives
        other.kill()
    with scratch.folder("check") as mine:
        assert not left.exists()
        old(mine)
        scratch.sweep()
        assert mine.exists()
    assert not mine.exists()
    assert {path.name for path in temporary.iterdir()} == {"moebench-caches-0", "moebench-by-hand", "theirs"}


def test_a_folder_as_young_as_not_to_be_locked_yet_is_left(temporary: Path) -> None:
    (temporary / "moebench-new").mkdir()
    (temporary / "moebench-new" / scratch.LOCK).touch()
    scratch.sweep()
    assert (temporary / "moebench-new").exists()


def test_logs_of_what_failed_stay_for_a_week(temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch.logs("check") as failed:
        raise ZeroDivisionError
    with scratch.logs("check") as fine:
        pass
    assert not fine.path.exists()
    old(failed.path, 6 * 86400)
    scratch.sweep()
    assert failed.path.exists()
    old(failed.path, 8 * 86400)
    scratch.sweep()
    assert not failed.path.exists()


def test_a_log_that_cannot_be_written_says_why_it_is_empty(tmp_path: Path) -> None:
    assert not last_words.no_room(tmp_path / "rank-0.log")
    assert "no space is left at /proc" in last_words.no_room(Path("/proc/rank-0.log"))
