"""MoGE's claim: judged by counting, with a free gate beside it."""

from __future__ import annotations

from harness import studies
from harness.report import claims


def test_devices_that_hold_whole_groups_are_evenly_loaded_and_others_are_not():
    found = studies.study("moge-balance").run(lambda line: None)
    table = found.tables["balance"].set_index(["gate", "routing", "ranks"]).sort_index()
    assert len(table) == 2 * 5 * 3
    moge, free = (table.loc[gate].drop("grouped", level="routing") for gate in ("moge", "top-k"))
    whole, split = (moge.index.get_level_values("ranks").isin(which) for which in ((4, 8), (16,)))
    assert (moge[whole]["max_over_mean"] == 1).all()
    assert (moge[whole]["imbalance_score"] == 0).all()
    assert (moge[split]["max_over_mean"] > 1).all()
    assert (moge["group_max_over_mean"] == 1).all()
    assert (free["imbalance_score"] > 0).all()
    every = claims.read(claims.RESULTS / "claims" / "moge.yaml")
    verdicts = claims.judge(every, claims.Sources(known={"moge-balance": lambda: found}))
    assert [verdict.outcome for verdict in verdicts] == ["reproduced", "not attempted"]
    assert verdicts[0].evidence == "simulated"
    assert verdicts[0].num_rows == 10
