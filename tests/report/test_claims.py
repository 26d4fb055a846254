"""Claims: what is refused, how values are made, and that a verdict never mixes evidence."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from harness.bench import suite
from harness.errors import UserError
from harness.report import claims
from harness.report.claims import RESULTS, Sources, Verdict, judge, read
from harness.studies import Findings
from tests.report.synthetic_run import RunMaker, experiment

CLAIM = """\
- id: faster
  paper: fsmoe
  statement: Faster.
  source: Table 5
  reported: [{item: grid, testbed: A, system: fsmoe, quantity: mean_speedup_over_tutel}]
  experiments:
    - {study: toy, table: layers, where: {schedule: fsmoe}, over: {schedule: tutel}, pair: [layer]}
  reproduced: {within: 0.02}
  partly: {above: 1}
"""


def toy(*ratios: float) -> Findings:
    """Layers that take ``ratios`` seconds under tutel and one second under fsmoe."""
    rows = [
        {"schedule": "tutel", "layer": i, "time_s": ratio, "evidence": "simulated"} for i, ratio in enumerate(ratios)
    ]
    rows += [{"schedule": "fsmoe", "layer": i, "time_s": 1.0, "evidence": "simulated"} for i in range(len(ratios))]
    return Findings({}, raw={"layers": pd.DataFrame(rows)})


def verdicts(tmp_path: Path, text: str, findings: Findings | None = None, **folders: Path) -> list[Verdict]:
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    known = {"toy": lambda: findings} if findings else {}
    return judge(read(path), Sources(known=known, **folders))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [((1.18, 1.19), "reproduced"), ((1.0, 1.3, 1.3), "partly"), ((1.4, 1.4), "partly"), ((0.9, 1.0), "not")],
)
def test_outcome_follows_the_criteria(tmp_path, ratios, outcome):
    (verdict,) = verdicts(tmp_path, CLAIM, toy(*ratios))
    assert verdict.outcome == outcome
    assert verdict.reported == (1.18,)
    assert verdict.found[0].point == pytest.approx(sum(ratios) / len(ratios))
    assert verdict.evidence == "simulated"
    assert verdict.num_rows == len(ratios)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ("estimator: geometric_mean", [2.0]),
        ("estimator: least", [1.0]),
        ("estimator: largest", [4.0]),
        ("estimator: mean", [2.5]),
        ("estimator: range", [1.0, 4.0]),
        ("per: [layer]", [1.0, 4.0]),
    ],
)
def test_estimators(tmp_path, change, values):
    text = CLAIM.replace("pair: [layer]", f"pair: [layer], {change}")
    if len(values) == 2:
        text = re.sub(r"reported: \[(.*)\]", r"reported: [\1, \1]", text)
    (verdict,) = verdicts(tmp_path, text, toy(1.0, 4.0))
    assert [value.point for value in verdict.found] == pytest.approx(values)


def test_columns_that_differ_are_counted(tmp_path):
    table = pd.DataFrame({"a": [1, 2, 4], "b": [1, 4, 2], "evidence": "simulated"})
    text = """\
- {id: differ, paper: fsmoe, statement: Differ., source: Sec. 4, reproduced: {above: 0},
   experiments: [{study: toy, table: layers, differ: [a, b], estimator: count},
                 {study: toy, table: layers, differ: [a, b], estimator: share}]}
"""
    count, share = verdicts(tmp_path, text, Findings({}, raw={"layers": table}))
    assert count.found[0].point == 2
    assert share.found[0].point == pytest.approx(2 / 3)


def test_evidence_is_never_mixed(tmp_path):
    findings = toy(1.2)
    rows = findings.raw["layers"]
    rows.loc[rows["schedule"] == "fsmoe", "evidence"] = "emulated"
    with pytest.raises(UserError, match=r"emulated.*simulated.*one level"):
        verdicts(tmp_path, CLAIM, findings)


def test_run_is_judged_with_its_interval(tmp_path):
    maker = RunMaker(tmp_path / "runs" / "mine")
    for model, fast in (("local-m1024-e64k8", 0.8), ("local-m512-e16k2", 0.9)):
        maker.timed(experiment("flat", model=model), 1.0)
        maker.timed(experiment("hiermoe-hd2", model=model), fast)
    bound = "{run: mine, where: {label: hiermoe-hd2}, over: {label: flat}, estimator: geometric_mean}"
    text = (
        CLAIM[: CLAIM.index("  experiments")] + f"  experiments: [{bound}]\n  reproduced: {{within: 0.02, above: 1}}\n"
    )
    (verdict,) = verdicts(tmp_path, text, runs=tmp_path / "runs")
    (value,) = verdict.found
    assert verdict.outcome == "reproduced"
    assert verdict.evidence == "emulated"
    assert verdict.num_rows == 2
    assert 1 < value.low < (1 / 0.72) ** 0.5 < value.high
    strict = text.replace("above: 1}", f"above: {value.point}}}")  # the interval reaches below its own point
    (verdict,) = verdicts(tmp_path, strict, runs=tmp_path / "runs")
    assert verdict.outcome == "not"


def test_what_is_not_there_is_not_attempted_and_says_why(tmp_path):
    run = "{run: fsmoe-emulated, where: {label: fsmoe}, over: {label: fsmoe-tutel}, estimator: geometric_mean}"
    ledger = "{ledger: true, column: r2, estimator: least}"
    text = re.sub(r"    - \{study.*\n", f"    - {run}\n    - {ledger}\n    - {{study: toy, table: layers}}\n", CLAIM)
    found = verdicts(tmp_path, text, runs=tmp_path, calibrations=tmp_path)
    assert [verdict.outcome for verdict in found] == ["not attempted"] * 3
    assert [verdict.evidence for verdict in found] == [""] * 3
    assert "moebench run --suite fsmoe-emulated" in found[0].why
    assert "moebench profile" in found[1].why


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("within: 0.02", "within: -1", r"claims.yaml: faster.reproduced.within: -1"),
        ("within: 0.02", "", r"faster.reproduced: .*needs within, below or above"),
        ("source: Table 5", "sauce: Table 5", r"faster.source.*is missing"),
        ("  reproduced: {within: 0.02}\n", "", r"has experiments but no criterion"),
        (", pair: [layer]", "", r"needs pair"),
        ("study: toy, table: layers", "study: toy", r"study and table go together"),
        ("study: toy, table: layers", "run: toy", r"a run is judged by geometric_mean"),
        ("reported: [", "reported: [{item: x, quantity: y}, ", r"2 reported values for 1 found"),
        ("system: fsmoe,", "system: fsmow,", r"claim faster.reported: .*names 0 rows"),
        ("where: {schedule: fsmoe}", "where: {schedule: fsmow}", r"selects no row of toy"),
        ("where: {schedule: fsmoe}", "where: {shedule: fsmoe}", r"'shedule': is no column; there are schedule, layer"),
        ("over: {schedule: tutel}", "over: {schedule: tutle}", r"has a row for 0 of 1 rows"),
        ("table: layers", "table: layer", r"'layer': unknown; known are layers"),
        ("- id: faster\n", "- id: faster\n  id: slower\n", r"claims.yaml line 2: .*written twice"),
        ("- id: faster", "- &a {}\n- id: faster", r"claims.yaml: claim 0.id"),
        ("- id", "x: y\n- id", r"claims.yaml line"),
        ("statement: Faster", "statement: Alone it is faster", r"faster: .*says 'alone', which no condition tests"),
        ("statement: Faster", "statement: Always faster", r"says 'always', which no condition tests"),
        ("  partly:", "  conditions: [{word: only, by: x}]\n  partly:", r"'only', which its statement does not say"),
        ("within: 0.02", "above: 1", r"reproduced does not compare with them: it would pass by sign"),
    ],
)
def test_bad_claims_are_one_line_that_names_the_field(tmp_path, old, new, message):
    assert old in CLAIM
    with pytest.raises(UserError, match=message) as error:
        verdicts(tmp_path, CLAIM.replace(old, new), toy(1.2))
    assert "\n" not in str(error.value)


def test_claim_without_experiments_says_why(tmp_path):
    head = CLAIM[: CLAIM.index("  experiments")]
    with pytest.raises(UserError, match="not_attempted says why"):
        verdicts(tmp_path, head)
    (verdict,) = verdicts(tmp_path, head + "  not_attempted: it needs 48 GPUs\n")
    assert (verdict.outcome, verdict.why, verdict.reported) == ("not attempted", "it needs 48 GPUs", (1.18,))


def of(table: pd.DataFrame, claim: str, paper: str, study: str, name: str) -> list[Verdict]:
    """Verdicts of a committed claim, if its study found ``table``."""
    (found,) = (each for each in read(RESULTS / "claims" / f"{paper}.yaml") if each.id == claim)
    return judge([found], Sources(known={study: lambda: Findings({}, raw={name: table.assign(evidence="simulated")})}))


@pytest.mark.parametrize(("largest", "outcome"), [((6, 6, 6), "not"), ((5, 5, 6), "reproduced"), ((7, 5, 6), "not")])
def test_who_reaches_it_alone_is_the_only_one_that_does(largest, outcome):
    table = pd.DataFrame({"system": ["ep", "hecate", "hecate-rm"], "largest_batch": largest})
    table["beyond_others"] = [a - max(b for b in largest[:i] + largest[i + 1 :]) for i, a in enumerate(largest)]
    (verdict,) = of(table, "rm-largest-batch", "hecate", "hecate-batches", "largest")
    assert verdict.found[0].point == 6
    assert verdict.outcome == outcome
    assert verdict.tested == (
        f"alone: mean of beyond_others is {6 - max(largest[:2])}, {'' if outcome == 'reproduced' else 'not '}above 0",
    )


@pytest.mark.parametrize(("over_lowest", "outcome"), [(1.0, "reproduced"), (1.2, "not")])
def test_what_is_the_lowest_is_below_the_others(over_lowest, outcome):
    table = pd.DataFrame({"system": ["smartmoe"], "state_over_ep": 1.0, "state_over_lowest": over_lowest})
    (verdict,) = of(table, "memory-smartmoe", "hecate", "hecate-memory", "models")
    assert verdict.outcome == outcome


def test_tails_are_shown_as_reductions_and_as_gains_and_their_sign_alone_reproduces_nothing():
    where = {"routing": "recorded", "traffic": "dispatcher", "efficiency": 0.5, "placement": "two-stage"}
    columns = {
        f"{part}_tail_{what}": value
        for part in ("experts", "a2a")
        for what, value in (("reduction", 20.0), ("gain", 25.0))
    }
    table = pd.DataFrame([{**where, "testbed": testbed, **columns} for testbed in ("single-node", "multi-node")])
    for claim in ("computation-tail", "all-to-all-tail"):
        found = of(table, claim, "moetuner", "moetuner-latency", "latency")
        assert [verdict.found[0].point for verdict in found] == [20, 25, 20, 25]
        assert {verdict.outcome for verdict in found} == {"partly"}
        found = of(table.assign(**dict.fromkeys(columns, -1.0)), claim, "moetuner", "moetuner-latency", "latency")
        assert {verdict.outcome for verdict in found} == {"not"}


def test_verdict_on_a_run_says_what_of_it_does_not_count(tmp_path):
    maker = RunMaker(tmp_path / "runs" / "mine")
    for workload in ("balanced-2048", "zipf-2"):
        maker.timed(experiment("flat", workload), 1.0)
    maker.timed(experiment("hiermoe-hd2"), 0.5)
    maker.without_time(experiment("hiermoe-hd2", "zipf-2"), "failed", "RuntimeError: bad day")
    bound = "{run: mine, where: {label: hiermoe-hd2}, over: {label: flat}, estimator: geometric_mean}"
    text = CLAIM[: CLAIM.index("  reported")] + f"  experiments: [{bound}]\n  reproduced: {{above: 1}}\n"
    (verdict,) = verdicts(tmp_path, text, runs=tmp_path / "runs")
    assert verdict.lacking == "Not ok: hiermoe-hd2, exchange on emulated-2x4, zipf-2 (failed: RuntimeError: bad day)"


def test_verdict_on_a_part_of_a_suite_says_what_of_it_is_not_there(tmp_path):
    bound = "{run: linkbound, where: {label: hiermoe-hd2}, over: {label: flat}, estimator: geometric_mean}"
    text = CLAIM[: CLAIM.index("  reported")] + f"  experiments: [{bound}]\n  reproduced: {{above: 1}}\n"
    cells = [each for each in suite.load("linkbound").experiments if each.system in ("flat", "hiermoe-hd2")]
    race = [each for each in cells if (each.workload, each.cluster) == (cells[0].workload, cells[0].cluster)]
    maker = RunMaker(tmp_path / "runs" / "linkbound")
    for each, seconds in zip(race, (1.0, 0.5), strict=True):
        maker.timed(each, seconds)
    (verdict,) = verdicts(tmp_path, text, runs=tmp_path / "runs")
    assert verdict.outcome == "reproduced"
    assert verdict.lacking.startswith("Not in the run: ")
    assert verdict.lacking.endswith(f", and {len(cells) - 3} more")


@pytest.mark.parametrize("path", sorted((RESULTS / "claims").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_claims_are_whole_and_their_numbers_are_printed(path):
    found = read(path)
    table = claims.reported(path.stem)
    assert {claim.paper for claim in found} == {path.stem}
    for claim in found:
        for keys in claim.reported:
            claims.look_up(table, keys, claim.id)
