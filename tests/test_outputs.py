"""What moebench did not write stays as it is, and outputs are tried before the work, by every command that has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from harness import cli, outputs, placing, presets, profiling, studies
from harness.errors import UserError
from harness.layer import stored
from harness.regress import run as regress
from harness.report import index
from harness.report.keep import keep
from harness.routing import trace


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit status of ``moebench WORDS``."""
    monkeypatch.setattr(sys, "argv", ["moebench", *map(str, words)])
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_a_file_is_replaced_only_if_it_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    outputs.check(path)
    assert not path.parent.exists()  # to try leaves nothing
    outputs.write(path, "1", list_it=True)
    outputs.check(path)
    outputs.write(path, "2", list_it=True)
    assert path.read_text() == "2"
    assert (path.parent / ".moebench").read_text() == "table.csv\n"
    (path.parent / "other.csv").write_text("mine")
    with pytest.raises(UserError, match=r"other.csv': is there and was not written by moebench; move it"):
        outputs.check(path.parent / "other.csv")
    with pytest.raises(UserError, match=r"other.csv"):
        outputs.check_folder(path.parent, (".csv",))
    with pytest.raises(UserError, match="cannot be written"):
        outputs.check(path / "below" / "a-file")
    with pytest.raises(UserError, match="cannot be written"):
        outputs.check(path.parent)
    outputs.check_folder(tmp_path / "none", (".csv",))


@pytest.mark.parametrize(
    "check",
    [trace.check_writable, stored.check_out, placing.check_out],
    ids=["trace", "weights", "placement"],
)
def test_every_file_that_a_command_writes_is_tried_first(check, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a diary")
    with pytest.raises(UserError, match="was not written by moebench"):
        check(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot be written"):
        check(Path("/proc/none/out"))
    check(tmp_path / "new")


def test_commands_try_their_outputs_before_the_work(tmp_path: Path, monkeypatch, capsys) -> None:
    def started(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(placing, "place", started)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    place = ("place", "--model", "record-e64k8", "--trace", "record-e64k8.parquet", "--cluster", "emulated-2x4")
    study = next(iter(studies.studies()))
    (mine / study).mkdir()
    (mine / study / "numbers.csv").write_text("mine")
    for words in (
        (*place, "--out", mine / "notes"),
        (*place, "--out", "/proc/none/p.json"),
        ("record", "--out", mine / "notes"),
        ("record", "--out", tmp_path / "t.parquet", "--weights", mine / "notes"),
        ("record", "--out", tmp_path / "t", "--weights", tmp_path / "t"),
        ("study", study, "--out", mine),
        ("study", study, "--out", "/proc/none"),
    ):
        assert command(monkeypatch, *words) == 2, words
        said = capsys.readouterr().err
        assert "written" in said or "the same file" in said, said
        assert len(said.splitlines()) <= 2, said
    assert (mine / "notes").read_text() == (mine / study / "numbers.csv").read_text() == "mine"


@pytest.mark.parametrize("folder", ["/proc/none", "a-file"])
def test_the_ledger_is_tried_before_anything_is_measured(folder: str, tmp_path: Path, monkeypatch) -> None:
    def started(*_, **__):
        raise AssertionError("the work has begun")

    (tmp_path / "a-file").touch()
    monkeypatch.setattr(profiling, "open_session", started)
    with pytest.raises(UserError, match=r"ledger: .*; choose an?\w* ") as raised:
        profiling.profile(presets.cluster("local-2"), print, folder=tmp_path / folder)
    assert "\n" not in str(raised.value)


def test_regress_deletes_nothing_and_knows_its_arguments_first(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(regress, "REFERENCE", tmp_path / "reference")
    notes = tmp_path / "regress" / "notes.md"
    notes.parent.mkdir()
    notes.write_text("a")
    (notes.parent / "table.csv").write_text("of yesterday")
    for words in ((), ("--suite", "nope"), ("--base", "no-such-revision"), ("--base", "x", "--save-reference")):
        assert command(monkeypatch, "regress", "--results", tmp_path, *words) == 2
        assert sorted(path.name for path in notes.parent.iterdir()) == ["notes.md", "table.csv"]
    first, second = regress.own_folder(tmp_path), regress.own_folder(tmp_path)
    assert first != second
    assert notes.read_text() == "a"
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "quick.json").write_text('"mine"')
    assert command(monkeypatch, "regress", "--save-reference", "--results", tmp_path) == 2
    assert "quick.json': is there and was not written by moebench" in capsys.readouterr().err


def test_pages_and_tables_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<title>my site</title>")
    with pytest.raises(UserError, match=r"index.html': is there and was not written by moebench"):
        index.write(tmp_path)
    assert "my site" in (tmp_path / "index.html").read_text()
    (tmp_path / "index.html").unlink()
    for _ in range(2):
        assert "moebench: reports" in index.write(tmp_path).read_text()
    tables = tmp_path / "report" / "tables"
    frame = pd.DataFrame({"a": [1]})
    for _ in range(2):
        keep(tables, "ours", frame)
    (tables / "theirs.csv").write_text("b\n")
    with pytest.raises(UserError, match="was not written by moebench"):
        keep(tables, "theirs", frame)
    (tmp_path / "report" / "summary.html").write_text("<title>moebench: quick</title>")  # of an older moebench
    keep(tables, "theirs", frame)
