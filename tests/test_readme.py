"""What the README shows is true: its commands parse, its experiments and its new system are accepted."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from harness import cli
from harness.bench import suite
from harness.registry import systems
from harness.system import System

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("moebench ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line):
    _, name, *words = shlex.split(line, comments=True)
    get_command(cli.app).commands[name].make_context(name, words)


def test_every_command_is_shown():
    assert {line.split()[1] for line in COMMANDS} == set(get_command(cli.app).commands)


def test_every_system_is_in_the_table():
    assert [name for name in systems() if f"`{name}`" not in README] == []


def test_the_experiments_are_accepted():
    (text,) = blocks("yaml")
    found = suite.parse(text, "README.md")
    assert len(found.races) == 6
    assert len(found.experiments) == 17


def test_the_new_system_is_one():
    (text,) = blocks("python")
    names: dict = {}
    exec(text, names)
    assert issubclass(names["Mine"], System)
    assert not inspect.isabstract(names["Mine"])
