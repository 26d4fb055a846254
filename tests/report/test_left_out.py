"""What has no time is counted, named and given its reason: on every page, and at the end of a run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness import cli
from harness.bench.store import STATUSES
from harness.bench.suite import Race
from harness.errors import UserError
from harness.plan.agreement import agreement
from harness.report import compare, context, ending, summary, versus, words
from harness.report.claims import Sources
from harness.report.paper import Paper
from harness.report.run import load
from harness.sweep.folder import SweepFolder
from harness.sweep.worker import plain
from tests.report.synthetic_run import RunMaker, experiment

WHY = "RuntimeError: bad day <3>"
SHOWN = "RuntimeError: bad day &lt;3&gt;"


def mixed(maker: RunMaker) -> RunMaker:
    """Of five systems three have times, one failed, one was refused; of another phase none has any."""
    for system, seconds in (("megatron", 1.0), ("flat", 0.9), ("hiermoe-hd2", 0.3)):
        planned = 60e6 if system != "megatron" else 0.0
        maker.timed(experiment(system), seconds, node_bytes=planned, launches=2)
    maker.without_time(experiment("deepspeed"), "refused", "needs CUDA")
    maker.without_time(experiment("tutel"), "failed", WHY, launches=2)
    maker.without_time(experiment("flat", phase="layer"), "nonconforming", "output off by 1")
    maker.write_records()
    return maker


def test_headline_counts_them_and_says_why(maker):
    exchange, layer = words.findings(load(mixed(maker).path))
    assert "hiermoe-hd2 is the fastest of 3 systems (of 5 that were to run) on balanced-2048" in exchange.sentences[0]
    assert (
        f"No time: tutel failed on balanced-2048: {WHY}; deepspeed refused on balanced-2048: needs CUDA."
        in exchange.sentences
    )
    assert not exchange.sure  # something failed
    assert layer.sentences[0] == "No system has a time here."
    assert "nonconforming" in layer.sentences[1]


@pytest.mark.parametrize(
    ("status", "launch"), [("cpu_bound", None), ("failed", 2), ("nonconforming", 2), ("hung", 2), ("unphysical", 2)]
)
def test_no_cell_that_is_not_ok_is_called_the_fastest(maker, status, launch):
    """Marked in all launches, or wrong or failed in the last of three."""
    maker.timed(experiment("flat"), 1.0)
    fast = experiment("hiermoe-hd2")
    if launch is None:
        maker.timed(fast, 0.2, status=status, reason="its cores")
    else:
        maker.timed(fast, 0.2, launches=launch)
        line = {"metric": "status", "value": float("nan"), "status": status, "reason": WHY}
        maker.append([{**maker.base(fast, launch), **line}])
    run = load(maker.path)
    (finding,) = words.findings(run)
    text = " ".join(finding.sentences)
    assert "hiermoe-hd2 is the fastest" not in text
    assert status in text
    assert not finding.sure
    wrong = status in ("nonconforming", "unphysical")
    assert ("hiermoe-hd2" in set(compare.times(run)["label"])) == (not wrong)


def test_every_table_of_times_has_them_beside_it(maker):
    run = load(mixed(maker).path)
    for html in (summary.speedups(run).html, context.beside(run), summary.setbacks(run).html):
        rows = re.findall(r"<tr.*?</tr>", html, flags=re.DOTALL)
        assert any("tutel" in row and SHOWN in row and "failed" in row for row in rows)
        assert any("deepspeed" in row and "needs CUDA" in row for row in rows)
        assert any("MoE layer" in row and "output off by 1" in row for row in rows)


def test_systems_whose_bytes_nobody_plans_keep_their_rows(maker):
    run = load(mixed(maker).path)
    traffic = compare.traffic(run)
    assert set(traffic["label"]) == {"megatron", "flat", "hiermoe-hd2"}
    lone = traffic[traffic["label"] == "megatron"]
    assert list(lone["direction"]) == ["forward", "backward", "total"]
    assert lone[["planned_bytes", "counted_bytes"]].isna().all(axis=None)
    for html in (summary.traffic(run).html, summary.light(run).html):
        (row,) = re.findall(
            r"<tr[^>]*>(?:(?!</tr>).)*megatron.*?</tr>", html.partition("<details>")[0], flags=re.DOTALL
        )
        assert "–" in row


def test_what_a_run_was_ended_before_is_not_run(maker):
    lost, known = experiment("megatron"), experiment("flat")
    maker.timed(known, 1.0, launches=2)
    maker.base(lost, 0)
    maker.write_records(launch=1, evidence="emulated")
    run = load(maker.path)
    (row,) = compare.setbacks(run).to_dict("records")
    assert (row["label"], row["status"], row["launches"], row["network"]) == ("megatron", "not run", "1", "shaped")
    (finding,) = words.findings(run)
    assert "Only flat has a time on balanced-2048 (1 system (of 2 that were to run))" in finding.sentences[0]


def test_what_a_sweep_has_not_come_to_stands_on_its_page(maker):
    done, lost = experiment("flat"), experiment("megatron", options={"x": 1})
    maker.timed(done, 1.0, launches=1)
    folder = SweepFolder(maker.path)
    race = plain(Race((done, lost), 1, 1, 1))
    cells = [
        [e.digest, 0, e.race, e.system, e.phase, e.model.name, e.cluster.name, e.workload.name] for e in (done, lost)
    ]
    folder.write("sweep.json", {"cells": cells})
    folder.add_job({"cluster": done.cluster.model_dump(mode="json"), "wire": done.wire, "tasks": [[0, race]]})
    run = load(maker.path)
    (row,) = compare.setbacks(run).to_dict("records")
    assert (row["label"], row["status"]) == ("megatron (x=1)", "unsubmitted")
    assert "moebench resume" in context.sweep(maker.path)
    assert "moebench resume" in summary.headline(run).html


def test_a_paper_s_own_run_names_them(maker, tmp_path):
    class Silent:
        def predictions(self, run) -> pd.DataFrame:
            cell = experiment("flat").digest
            return pd.DataFrame({"cell": [cell], "direction": ["total"], "predicted_s": [1.0]})

        def timelines(self, run, cell) -> dict:
            return {}

        agreement = staticmethod(agreement)

    paper = Paper("hiermoe", tmp_path, mixed(maker).path, Sources(known={}))
    html = paper.own_run("s", "hiermoe-hd2", "megatron", Silent()).html
    beside = html.partition("<details>")[0]
    assert "tutel" in beside
    assert SHOWN in beside
    assert (
        "Timed, but not predicted, as the simulator does not know them there: megatron (1 of its races), hiermoe"
        in html
    )
    pooled = pd.read_csv(paper.tables / "pooled_speedups.csv").set_index("label")  # type: ignore[operator]
    assert np.isnan(pooled.loc["tutel", "point"])
    html = paper.own_run("s", "hiermoe-hd2", "tutel", Silent()).html
    assert "tutel has no time in this run, so ratios are over hiermoe-hd2" in html


def test_two_runs_side_by_side_name_what_became_of_a_cell(maker, tmp_path):
    mixed(maker)
    other = RunMaker(tmp_path / "runs" / "old")
    for system in ("flat", "tutel"):
        other.timed(experiment(system), 1.0)
    other.without_time(experiment("deepspeed"), "oom", "out of memory: 9 GB")
    html = versus.only_one(load(maker.path), load(other.path)).html
    rows = {
        name: row
        for row in re.findall(r"<tr.*?</tr>", html, flags=re.DOTALL)
        for name in ("tutel", "deepspeed", "megatron")
        if name in row
    }
    assert SHOWN in rows["tutel"]
    assert "timed" in rows["tutel"]
    assert "refused: needs CUDA" in rows["deepspeed"]  # in neither
    assert "out of memory: 9 GB" in rows["deepspeed"]
    assert "is not in it" in rows["megatron"]


def test_two_runs_of_forward_alone_are_compared(maker, tmp_path):
    cell = experiment("flat", backward=False)
    for run, value in ((maker, 1.0), (other := RunMaker(tmp_path / "runs" / "old"), 2.0)):
        line = {"metric": "time_s", "direction": "forward", "unit": "s"}
        run.append([{**run.base(cell, 0), **line, "value": value, "rep": rep} for rep in range(2)])
    html = versus.table(load(maker.path), load(other.path)).html
    assert "old / demo" in html
    assert ">2.00×<" in html


@pytest.mark.parametrize(
    ("timed", "baseline", "control"),
    [
        (("megatron", "flat", "tutel"), "megatron", "flat"),
        (("flat", "tutel"), "flat", "flat"),
        (("tutel", "hiermoe-hd2"), "hiermoe-hd2", "hiermoe-hd2"),
        ((), "megatron", "megatron"),
    ],
)
def test_the_baseline_is_one_that_ran(maker, timed, baseline, control):
    for system in {"megatron", "flat", "tutel"} - set(timed):
        maker.without_time(experiment(system), "failed", WHY)
    for system in timed:
        maker.timed(experiment(system), 1.0, launches=1, reps=1)
    run = load(maker.path)
    assert (run.baseline, run.control) == (baseline, control)


def test_a_reference_that_is_several_is_one_line_that_names_them(maker):
    for dimension in (1, 2):
        maker.timed(experiment("hiermoe-hd", options={"dimension": dimension}), 1.0, launches=1, reps=1)
    maker.without_time(experiment("megatron"), "failed", WHY)
    maker.write_records()
    assert load(maker.path).baseline == "hiermoe-hd (dimension=1)"
    named = "hiermoe-hd (dimension=1), hiermoe-hd (dimension=2)"
    for field in ("baseline", "control"):
        with pytest.raises(
            UserError, match=f"^{field}: 'hiermoe-hd': is several in demo; name one of {re.escape(named)}$"
        ):
            load(maker.path, **{field: "hiermoe-hd"})
        with pytest.raises(
            UserError, match=f"^{field}: 'nope': is no system of demo; there are {re.escape(named)}, megatron$"
        ):
            load(maker.path, **{field: "nope"})
    assert load(maker.path, baseline="hiermoe-hd (dimension=2)").labels[0] == "hiermoe-hd (dimension=2)"


def test_the_page_of_a_paper_s_suite_is_the_paper_s():
    runs = Path("results/runs")
    assert ending.page_command(runs / "hiermoe-emulated", runs) == "moebench report hiermoe"
    assert ending.page_command(runs / "quick", runs) == "moebench report quick"
    assert [ending.status({"ok": 1, name: 1}) for name in STATUSES] == [0, 0, 1, 1, 1, 1, 1, 0]


SUITE = """
name: mine
defaults: {model: local-m1024-e64k8, cluster: emulated-2x4, workload: balanced-2048, phase: exchange, launches: 1}
experiments:
  - system: [SYSTEMS]
"""


@pytest.mark.parametrize(
    ("systems", "exit_status", "told"),
    [
        ("flat", 0, []),
        ("flat, deepspeed", 0, ["refused"]),
        ("flat, deepspeed, hiermoe-hd2", 0, ["cpu_bound", "refused"]),
        ("flat, megatron, deepspeed", 1, ["unphysical", "refused"]),
        ("deepspeed", 1, ["refused"]),
    ],
)
def test_the_end_of_a_run_names_them_with_the_page_and_its_exit_status_says_it(
    tmp_path, monkeypatch, capsys, systems, exit_status, told
):
    """Of runs whose cells are all stored, so that no rank need start."""
    maker = RunMaker(tmp_path / "runs" / "mine")
    maker.timed(experiment("flat"), 1.0, launches=1)
    maker.timed(experiment("hiermoe-hd2"), 0.5, launches=1, status="cpu_bound", reason="1.9 of 2 cores")
    maker.timed(experiment("megatron"), 0.5, launches=1, status="unphysical", reason="faster than the link")
    maker.without_time(experiment("deepspeed"), "refused", "needs CUDA")
    (tmp_path / "mine.yaml").write_text(SUITE.replace("SYSTEMS", systems))
    for flags in ([], ["--json"]) if len(told) == 2 else (["--json"],):
        words = ["run", str(tmp_path / "mine.yaml"), "--results", str(tmp_path / "runs"), *flags]
        monkeypatch.setattr(sys, "argv", ["moebench", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code or 0) == exit_status
        out = capsys.readouterr().out
        if flags:
            found = json.loads(out)
            assert [row["status"] for row in found["not_ok"]] == told
            assert all(row["why"] for row in found["not_ok"])
            assert found["page"] == f"moebench report mine --results {tmp_path / 'runs'}"
        else:
            assert out.splitlines()[-1].startswith("the page: moebench report mine")
            assert out.startswith(f"{tmp_path / 'runs' / 'mine'}: ")
            for reason in ("needs CUDA", "faster than the link"):
                assert (reason in out) == (("refused" if "CUDA" in reason else "unphysical") in told)
