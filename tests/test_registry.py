"""A file of systems that is at fault costs what it would have brought, and is named in one line; the rest works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOOD = """
from baselines.flat import Flat


class Good(Flat):
    name = "good"
"""
FILES = {
    "imports": ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
    "syntax": ("def broken(:\n", "SyntaxError: "),
    "exits": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "raises": ("raise RuntimeError('bad\\nday')\n", "RuntimeError: bad day"),
    "nameless": (
        "from harness.plan.native import NativeSystem\n\n\nclass Nameless(NativeSystem):\n    title = source = 'x'\n"
        "\n    @classmethod\n    def exchange(cls, case, job): ...\n",
        "class Nameless has no name",
    ),
    "hollow": (
        "from harness.system import System\n\n\nclass Hollow(System):\n    name = title = source = kind = 'hollow'\n",
        "class Hollow has no method build, no method tolerance",
    ),
    "untitled": (
        "from harness.plan.native import NativeSystem\n\n\nclass Untitled(NativeSystem):\n    name = 'untitled'\n"
        "\n    @classmethod\n    def exchange(cls, case, job): ...\n",
        "class Untitled has no title, no source",
    ),
    "misnamed": (GOOD.replace('"good"', '"a b"'), "class Good has no name of letters"),
    "aaa": (GOOD.replace('"good"', '"flat"'), "class Good has the name 'flat' of Flat of "),
    "unchanged": (GOOD.replace('    name = "good"', "    pass"), "class Good has the name 'flat' of Flat of "),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """``moebench list systems`` with all of these dropped in, beside a good one and two of one strange name."""
    folder = tmp_path_factory.mktemp("dropped")
    for name, (text, _) in FILES.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "good.py").write_text(GOOD)
    for name in ("one", "two"):
        (folder / f"{name}.py").write_text(GOOD.replace('"good"', '"other"'))
    (folder / "nostudies").mkdir()
    (folder / "nostudies" / "__init__.py").touch()
    (folder / "nostudies" / "studies.py").write_text("TUDIES = {}\n")
    (folder / "exitstudies").mkdir()
    (folder / "exitstudies" / "__init__.py").touch()
    (folder / "exitstudies" / "studies.py").write_text("raise SystemExit(4)\n")
    (folder / "oddstudies").mkdir()
    (folder / "oddstudies" / "__init__.py").touch()
    odd = "from harness.studies import Study\nSTUDIES = {'five': 5, 7: Study('a', print), '../up': Study('b', print)}\n"
    (folder / "oddstudies" / "studies.py").write_text(odd)
    text = (
        f"import baselines; baselines.__path__.append({str(folder)!r}); import sys; sys.argv[0] = 'moebench'"
        "; from harness import cli, studies; assert len(studies.studies()) > 3; cli.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", text, "list", "systems", "--json"], cwd=ROOT, capture_output=True, text=True
    )


def test_the_rest_works(said: subprocess.CompletedProcess[str]) -> None:
    assert said.returncode == 0, said.stderr
    names = {system["name"] for system in json.loads(said.stdout)}
    assert {"flat", "good", "megatron", "hecate", "hiermoe-hd2"} <= names
    assert not names & {"hollow", "untitled", "a b", "other"}


@pytest.mark.parametrize("name", FILES)
def test_one_line_names_the_file_and_why(said: subprocess.CompletedProcess[str], name: str) -> None:
    lines = [
        line for line in said.stderr.splitlines() if f"{name}.py: " in line and line.startswith("moebench: left out")
    ]
    assert len(lines) == 1, said.stderr
    assert FILES[name][1] in lines[0]


def test_of_two_of_one_name_that_is_neither_files_none_is_taken(said: subprocess.CompletedProcess[str]) -> None:
    assert sum("has the name 'other' of Good of" in line for line in said.stderr.splitlines()) == 2
    assert "studies.py: AttributeError: " in said.stderr
    assert "studies.py: SystemExit: 4" in said.stderr
    for key in ("'five'", "7", "'../up'"):
        assert f"studies.py: STUDIES[{key}] must be a Study under a name of letters" in said.stderr
