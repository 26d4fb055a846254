"""What a rank, a row and a terminal are told of any exception: its class, its words, where it was raised."""

from __future__ import annotations

import pytest

from harness import registry
from harness.errors import told, words
from harness.launch.rank import raised


class Speechless(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no words")


def _from_cause() -> None:
    try:
        raise OSError("disk full")
    except OSError as error:
        raise RuntimeError("no checkpoint") from error


def _group() -> None:
    raise ExceptionGroup("two tasks failed", [ValueError("bad day"), TypeError("worse")])


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("fails", "wanted"),
    [
        (lambda: _raise(Speechless()), "Speechless: its str() raises ValueError: no words, at tests/test_errors.py:"),
        (lambda: _raise(SystemExit("over")), "SystemExit: over, at tests/test_errors.py:"),
        (lambda: _raise(RuntimeError("\udcff\x1b[31mred\x00")), r"RuntimeError: \udcff\x1b[31mred\x00, at"),
        (lambda: _raise(RuntimeError("Größe\n  zu groß")), "RuntimeError: Größe zu groß, at"),
        (_from_cause, "RuntimeError: no checkpoint, from OSError: disk full, at tests/test_errors.py:"),
        (_group, "ExceptionGroup: two tasks failed (2 sub-exceptions), from ValueError: bad day, at"),
        (lambda: _raise(RuntimeError("x" * (1 << 20))), f"RuntimeError: {'x' * 997}..., at"),
    ],
)
def test_any_exception_is_one_line_that_every_terminal_and_file_takes(fails, wanted: str) -> None:
    try:
        fails()
    except BaseException as error:
        line, message = told(error), raised(0, error, "a phase").message
    assert line.startswith(wanted)
    assert line.isprintable()
    assert line.encode()
    assert message == line


def test_a_file_of_a_system_may_fail_with_an_exception_that_cannot_speak() -> None:
    registry._left_out("baselines.nobody", Speechless())
    assert registry._faults.popitem()[0] == f"baselines.nobody: Speechless: {words(Speechless())}"
