"""From what the ranks of a race returned to the rows of the store."""

from __future__ import annotations

import collections
import dataclasses
import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import registry
from harness.bench import physics, stepwise
from harness.bench.store import SCHEMA_VERSION, SIMULATED, identity
from harness.bench.suite import Race
from harness.case import cases_of, in_order, num_layers, system_of
from harness.plan.graph import Plan, Timeline
from harness.routing import Certificate, certify, make_routing, walk
from harness.routing.certificate import expert_counts
from harness.routing.groups import num_even_groups
from harness.specs import SERVING, Cluster, Experiment
from harness.topology import Topology

if TYPE_CHECKING:
    import pandas as pd

    from harness.simulation import Simulation

#: a shaped run that keeps more of its cores busy than this measures the cores and not the link
MAX_CORES_SHARE = 0.75
MODELLED = "modelled"  # the network of what is simulated
SMALL = 10_000_000  # assignments of tokens to experts, over all layers of a step
TIMES = ("time_s", "rank_time_s", "device_time_s", "host_time_s")
_ERRORS = {
    "output": "error_output",
    "input_grad": "error_input_grad",
    "weight_grad": "error_weight_grad",
    "loss": "error_loss",
    "logits": "error_logits",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a race ran."""

    run: str
    launch: int
    evidence: str
    network: Mapping[str, Any]  # the session's facts
    refuse_cpu_bound: bool = False


def nowhere(cluster: Cluster) -> tuple[str, dict[str, Any]]:
    """Evidence and network of rows of ``cluster`` that were never timed on it."""
    physical = cluster.kind == "physical"
    return ("measured", {"network": "physical"}) if physical else ("emulated", {"network": "unshaped"})


def is_small(experiment: Experiment) -> bool:
    """Whether the routing of all its layers is drawn in a moment."""
    num_tokens = sum(experiment.workload.tokens(experiment.cluster.num_ranks))
    return num_layers(experiment) * num_tokens * experiment.model.top_k <= SMALL


def now_utc() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def rows_of_race(
    race: Race, setting: Setting, answers: list[dict[str, Any]], failed: Mapping[str, tuple[str, str]]
) -> pd.DataFrame:
    """``answers``: what ``run_race`` returned on each rank (empty if no rank answered); ``failed``: status and reason
    of cells that ended their session, by digest."""
    cells, time_utc = [], now_utc()
    for experiment in race.experiments:
        if experiment.digest in failed or not answers:
            status, reason = failed[experiment.digest]
            cells.append(_Cell(experiment, setting, time_utc).without_time(status, reason))
        else:
            cells.append(_Cell(experiment, setting, time_utc).timed(answers))
    import pandas as pd  # slow to import, and only the rank that stores needs it

    return pd.DataFrame([row for cell in cells for row in cell])


def rows_of_simulation(experiment: Experiment, run: str, outcome: Simulation | tuple[str, str]) -> pd.DataFrame:
    """``outcome``: what the judge says of a cell, or status and reason where it says nothing."""
    cell = _Cell(experiment, Setting(run, 0, SIMULATED, {"network": MODELLED}), now_utc())
    import pandas as pd

    return pd.DataFrame(cell.without_time(*outcome) if isinstance(outcome, tuple) else cell.simulated(outcome))


def timelines_of_race(answers: list[dict[str, Any]]) -> dict[str, dict[str, Timeline]]:
    """What ``run_race`` returned on each rank -> timelines [num_tasks, ranks] of each cell's last repetition, by
    direction. Where ranks have no common clock, each one's starts at 0."""
    found: dict[str, dict[str, Timeline]] = {}
    for cell, outcome in answers[0]["cells"].items() if answers else ():
        for direction, trace in outcome["trace"].items():
            plan = Plan()
            for name, lane, kind in trace["tasks"]:
                plan.add(name, lane, kind=kind)
            ranks = [answer["cells"][cell]["trace"][direction] for answer in answers]
            start, end = (np.array([rank[key] for rank in ranks]).T for key in ("start_s", "end_s"))
            origin = 0.0 if answers[0]["shared_clock"] else start.min(0)
            found.setdefault(cell, {})[direction] = Timeline(plan, start - origin, end - origin)
    return found


def certificate(experiment: Experiment) -> Certificate | None:
    """Of the routing at step 0 and layer 0; None for a natural one, which nobody knows before it runs."""
    topology = Topology(experiment.cluster.shape)
    routing = make_routing(experiment.workload, experiment.model, topology)
    if routing is None:
        return None
    placement = in_order(experiment)
    num_groups = num_even_groups(experiment.workload, experiment.model)
    found = certify(routing, placement, topology, experiment.model.capacity_factor, num_groups, experiment.groups)
    fitted = tuple(dataclasses.asdict(each) for each in walk.told(experiment.workload))
    return dataclasses.replace(found, fitted=fitted)


class _Cell:
    """Rows of one cell of one launch."""

    def __init__(self, experiment: Experiment, setting: Setting, time_utc: str):
        self.experiment, self.setting = experiment, setting
        self.rows: list[dict[str, Any]] = []
        self.base = {
            "run": setting.run,
            "launch": setting.launch,
            "cell": experiment.digest,
            **identity(experiment),
            "wire": str(setting.network.get("wire", experiment.wire)),
            "evidence": setting.evidence,
            "network": str(setting.network["network"]),
            "time_utc": time_utc,
            "schema_version": SCHEMA_VERSION,
            "status": "ok",
            "reason": "",
        }

    def without_time(self, status: str, reason: str) -> list[dict[str, Any]]:
        self._add("status", float("nan"), "", status=status, reason=reason)
        return self.rows

    def timed(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        outcomes = [answer["cells"][self.experiment.digest] for answer in answers]
        for name in dict.fromkeys(name for outcome in outcomes for name in outcome["errors"]):
            self._add(_ERRORS[name], max(outcome["errors"].get(name, 0.0) for outcome in outcomes), "relative")
        worst = next((outcome for outcome in outcomes if outcome["status"] != "ok"), None)
        if worst is not None:
            for row in self.rows:
                row |= {"status": worst["status"], "reason": worst["reason"]}
            return self.without_time(worst["status"], worst["reason"])
        self._routing()
        budgets = physics.budgets(self.experiment, system_of(self.experiment), cases_of(self.experiment))
        self._plan(budgets)
        self._placed()
        for name, value in answers[0].get("launch_settings", {}).items():
            self._add(name, value, "1")
        self._times(answers, outcomes, budgets)
        for part, text in outcomes[0].get("how", {}).items():
            if text:
                self._add("how", float("nan"), "", level=part, reason=text)
        for rank, outcome in enumerate(outcomes):
            for kind, metric in (("measured", "memory_bytes"), ("planned", "memory_planned_bytes")):
                for part, value in outcome.get("memory", {}).get(kind, {}).items():
                    self._add(metric, value, "bytes", level=part, rank=rank)
        return self.rows

    def simulated(self, found: Simulation) -> list[dict[str, Any]]:
        """A repetition a step. What would take drawing the routing of a large model once more is left out."""
        self.base |= {"basis": found.basis, "heldout_error": found.heldout_error}
        self._routing()
        if is_small(self.experiment):
            cases = cases_of(self.experiment)
            self._plan(physics.budgets(self.experiment, system_of(self.experiment), cases))
            self._placed()
        num_tokens = sum(self.experiment.workload.tokens(self.experiment.cluster.num_ranks))
        samples = {direction: list(map(float, seconds)) for direction, seconds in found.samples.items()}
        if {"forward", "backward"} <= samples.keys() and "total" not in samples:
            pairs = zip(samples["forward"], samples["backward"], strict=True)
            samples["total"] = [forward + backward for forward, backward in pairs]
        for direction, seconds in samples.items():
            for rep, value in enumerate(seconds):
                self._add("time_s", value, "s", direction=direction, rep=rep)
                if self.experiment.phase in SERVING:
                    self._add("tokens_per_s", num_tokens / value, "tokens/s", direction=direction, rep=rep)
        if stepwise.drifts(self.experiment):
            for rep, moved in enumerate(found.moved):
                self._step(rep, found.first + rep, moved, ran=False)
        for note in found.notes:
            self._add("note", float("nan"), "", reason=note)
        return self.rows

    def _add(self, metric: str, value: float, unit: str, **fields: Any) -> None:
        place = {"direction": "", "level": "", "rep": -1, "rank": -1}
        self.rows.append({**self.base, **place, "metric": metric, "value": float(value), "unit": unit, **fields})

    def _routing(self) -> None:
        found = certificate(self.experiment)
        for level, value in (found.max_over_mean if found else {}).items():
            self._add("max_over_mean", value, "ratio", level=level)

    def _plan(self, budgets: Mapping[str, physics.Budget]) -> None:
        names = [level.name for level in self.experiment.cluster.levels]
        for direction, budget in budgets.items():
            if budget.bytes_by_level is not None and self.experiment.exactly_planned:
                for level, value in zip(names, budget.bytes_by_level, strict=True):
                    self._add("bytes_planned", value, "bytes", direction=direction, level=level)
            if budget.speed_of_light_s is not None and self.base["network"] != "unshaped":
                self._add("speed_of_light_s", budget.speed_of_light_s, "s", direction=direction)

    def _step(self, rep: int, step: int, moved: Mapping[str, float], *, ran: bool) -> None:
        """Of a repetition that had another routing than those before: which step it was, and what was ``moved``."""
        found = stepwise.certify_step(self.experiment, step, ran=ran)
        self._add("step", step, "1", rep=rep, reason=found.digest)
        for level, value in found.max_over_mean.items():
            self._add("step_max_over_mean", value, "ratio", rep=rep, level=level)
        if step:
            self._add("drift", found.drift, "share", rep=rep)
        for kind, num_bytes in moved.items():
            self._add("moved_bytes", num_bytes, "bytes", rep=rep, level=kind)

    def _placed(self) -> None:
        """What a server's placement makes of the load, layer by layer."""
        if self.experiment.phase not in SERVING or not self.experiment.exactly_planned:
            return
        for layer, case in enumerate(cases_of(self.experiment)):
            load = np.concatenate([expert_counts(part.routing).sum(0) @ part.placement.hosts for part in case.parts])
            self._add("placed_max_over_mean", load.max() / max(load.mean(), 1e-300), "ratio", level=f"layer{layer}")

    def _times(
        self, answers: list[dict[str, Any]], outcomes: list[dict[str, Any]], budgets: Mapping[str, physics.Budget]
    ) -> None:
        """Every repetition with what it cost; then the judgement over all of them, on every time row."""
        shared, totals, cores = answers[0]["shared_clock"], dict[int, list[float]](), list[float]()
        wrong: list[str] = []
        first = len(self.rows)
        for samples in zip(*(outcome["samples"] for outcome in outcomes), strict=True):  # [rank]
            rep, direction = samples[0]["rep"], samples[0]["direction"]
            where = {"rep": rep, "direction": direction}
            own_times = [_own_time(sample) for sample in samples]
            time_s = _span(samples) if shared else max(own_times)
            self._add("time_s", time_s, "s", **where)
            for rank, own in enumerate(own_times):
                self._add("rank_time_s", own, "s", rank=rank, **where)
            if samples[0]["device_s"] is not None:
                self._add("device_time_s", max(own_times), "s", **where)
                host_time_s = max(sample["end_s"] - sample["start_s"] for sample in samples)
                self._add("host_time_s", host_time_s, "s", **where)
            if samples[0]["loss"] is not None:
                self._add("loss", samples[0]["loss"], "nats", **where)
            if stepwise.drifts(self.experiment):
                moved = sum((collections.Counter(sample["moved_bytes"]) for sample in samples), collections.Counter())
                self._step(rep, samples[0]["step"], moved, ran=True)
            if self.experiment.phase in SERVING:
                tokens = sum(self.experiment.workload.tokens(len(answers)))
                self._add("tokens_per_s", tokens / time_s, "tokens/s", **where)
            for rank, sample in enumerate(samples):
                for part, of_layers in (sample["parts_s"] or {}).items():
                    for layer, seconds in enumerate(of_layers):
                        self._add(f"{part}_s", seconds, "s", level=f"layer{layer}", rank=rank, **where)
            counted = samples[0]["num_bytes"]
            for level, value in zip(self.experiment.cluster.levels, counted or [], strict=False):
                self._add("bytes_counted", value, "bytes", level=level.name, **where)
            own_cores, foreign_cores = _cores(answers, samples, time_s)
            self._add("own_cores", own_cores, "cores", **where)
            self._add("foreign_cores", foreign_cores, "cores", **where)
            totals.setdefault(rep, []).append(time_s)
            cores.append(own_cores)
            wrong += physics.violations(
                self.experiment.cluster,
                self.setting.network,
                budgets.get(direction),
                time_s,
                counted,
                exact=self.experiment.exactly_planned,
            )
        for rep, parts in totals.items():
            if len(parts) > 1:
                self._add("time_s", sum(parts), "s", rep=rep, direction="total")
        self._judge(first, wrong, float(np.mean(cores)), answers[0]["num_cores"])

    def _judge(self, first: int, wrong: list[str], own_cores: float, num_cores: int) -> None:
        timed = [row for row in self.rows[first:] if row["metric"] in TIMES]
        if wrong:
            verdict = {"status": "unphysical", "reason": f"{len(wrong)} violations, the first: {wrong[0]}"}
        elif self.base["network"] == "shaped" and own_cores > MAX_CORES_SHARE * num_cores:
            reason = (
                f"used {own_cores:.2f} of {num_cores} cores, more than {MAX_CORES_SHARE:.0%}: the link is not the limit"
            )
            verdict = {"status": "cpu_bound", "reason": reason}
            if self.setting.refuse_cpu_bound:
                self.rows = [row for row in self.rows if row["metric"] not in TIMES]
                self.without_time(**verdict)
                return
        else:
            return
        for row in timed:
            row |= verdict


def _span(samples: tuple[dict[str, Any], ...]) -> float:
    """One clock: from the first rank's start to the last rank's end."""
    return float(max(sample["end_s"] for sample in samples) - min(sample["start_s"] for sample in samples))


def _own_time(sample: Mapping[str, Any]) -> float:
    return float(sample["device_s"] if sample["device_s"] is not None else sample["end_s"] - sample["start_s"])


def _cores(answers: list[dict[str, Any]], samples: tuple[dict[str, Any], ...], time_s: float) -> tuple[float, float]:
    """Cores that this job's ranks and that others kept busy, on the machine where the ranks kept most busy.

    Ranks with one clock share one machine, whatever their namespaces call it."""
    machines: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        machines.setdefault("" if answer["shared_clock"] else answer["host"], []).append(rank)
    found = []
    for ranks in machines.values():
        own = sum(samples[rank]["own_cpu_s"] for rank in ranks) / time_s
        window = samples[ranks[0]]
        others = window["window_busy_s"] - sum(samples[rank]["window_cpu_s"] for rank in ranks)
        found.append((own, max(0.0, others / window["window_s"])))
    return max(found)


def estimate_s(experiment: Experiment, repeats: int, warmup: int) -> float:
    """A rough time of one cell in one launch: its bytes at line rate with a margin, and what is done around it."""
    system = system_of(experiment)
    if registry.state(system)[1] is not None:
        return 0.0
    if experiment.digest not in _limits:
        budgets = physics.budgets(experiment, system, cases_of(experiment))
        _limits[experiment.digest] = next(reversed(budgets.values())).speed_of_light_s or 0.05
    return (repeats + max(1, warmup)) * (1.3 * _limits[experiment.digest] + 0.05) + 1.5


_limits: dict[str, float] = {}
