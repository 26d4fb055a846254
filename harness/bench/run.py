"""Runs a suite: one allocation per cluster and wire, one session of ranks per launch, races interleaved inside.

Rows are stored after every race, so whatever ends a run, the next one resumes after the finished races.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import registry
from harness.bench import lock, provenance, tidy
from harness.bench.progress import shown
from harness.bench.store import Store
from harness.bench.suite import Race, Suite, load
from harness.errors import STATUS_OF_FAILURE, RankFailure, UserError, bad
from harness.layer.work import expert_parameters
from harness.specs import Cluster, Experiment

RUN_RACE = "harness.bench.race:run_race"
SESSION_START_S = 6.0
MIN_TIMEOUT_S = 300.0
DRAWN_PER_S = 10e6  # weights that a rank draws, at least
USUAL_DRAWING = 0.25  # of the time that this takes: what one thread of a server's core needs
_DIGEST = re.compile(r"\[([0-9a-f]{16})\]")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is still to be done on one cluster over one wire."""

    cluster: Cluster
    wire: str
    tasks: tuple[tuple[int, Race], ...]  # (launch, race), launch by launch

    @property
    def launches(self) -> list[int]:
        return sorted({launch for launch, _ in self.tasks})

    @property
    def estimate_s(self) -> float:
        cells = ((race, experiment) for _, race in self.tasks for experiment in race.experiments)
        work = sum(expected_s(experiment, race) for race, experiment in cells)
        return work + SESSION_START_S * len(self.launches)

    @property
    def num_units(self) -> int:
        """Units of progress: admitting a system, and each of its repetitions."""
        return sum(_units(race) for _, race in self.tasks)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to run, the same for all plans of a run."""

    run_dir: Path
    refuse_cpu_bound: bool = False
    timeout_s: float | None = None  # of one race; None: from its estimate
    checkpoint_every: int = 10  # training steps, where experts change places; 0: never
    part: str = ""  # what tells this process from others that fill the same folder: a job of a sweep


def run_suite(
    suite: Suite | Path | str,
    out_dir: Path | str,
    *,
    launches: int | None = None,
    resume: bool = True,
    refuse_cpu_bound: bool = False,
    timeout_s: float | None = None,
    checkpoint_every: int = 10,
    show_progress: bool = True,
) -> dict[str, int]:
    """Run ``suite`` (a ``Suite``, a name or a YAML file) into the folder ``out_dir``; its name is the run's.

    ``launches`` instead of the file's; ``resume=False`` puts an older run of that name aside first;
    ``refuse_cpu_bound`` keeps no time of a shaped run that its own CPU use limits. Returns the number of cells (times
    launches) by status. Ctrl-C keeps what was finished. Raises ``UserError`` before any work for anything wrong with
    the file or the folder, which another process may be filling; what a cell alone cannot run with is a row of status
    failed, and the others run.
    """
    from harness.bench import inputs
    from harness.launch.allocation import submit  # the one place where the bench looks up to launch

    suite = suite if isinstance(suite, Suite) else load(suite, strict=False)
    if launches is not None and launches < 1:
        raise bad("launches", launches, "must be at least 1")
    if checkpoint_every < 0:
        raise bad("checkpoint_every", checkpoint_every, "must be a number of training steps; 0 keeps none")
    suite = inputs.sift(suite)
    settings = Settings(Path(out_dir).resolve(), refuse_cpu_bound, timeout_s, checkpoint_every)
    store = Store(settings.run_dir)
    older = settings.run_dir.exists()
    store.prepare()
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.held(settings.run_dir))
        if older and not resume:
            put_aside(settings.run_dir)
            store.prepare()
            stack.enter_context(lock.held(settings.run_dir))
        store.refuse_other(simulated=False)
        plans = plan(suite, launches, store.finished())
        inputs.store_bad(store, suite, launches)
        on_progress = stack.enter_context(shown(plans, show_progress))
        for each in plans:
            submit(
                run_plan,
                each,
                settings,
                provenance.command_line(),
                folder=settings.run_dir / "logs",
                timeout_min=max(60, round(each.estimate_s / 60 * 10)),
                name=suite.name,
                on_progress=on_progress,
            )
    return summary(store, suite)


def plan(suite: Suite, launches: int | None, finished: set[tuple[str, int]]) -> list[Plan]:
    """Races with an unfinished cell, by cluster and wire. Such a race runs again whole: its pairs stay interleaved."""
    groups: dict[tuple[str, str], list[tuple[int, Race]]] = collections.defaultdict(list)
    for launch in range(launches or max(race.launches for race in suite.races)):
        for race in suite.races:
            wanted = launch < (launches or race.launches)
            if wanted and any((experiment.digest, launch) not in finished for experiment in race.experiments):
                groups[race.first.cluster.digest, race.first.wire].append((launch, race))
    return [Plan(tasks[0][1].first.cluster, wire, tuple(tasks)) for (_, wire), tasks in groups.items()]


def run_plan(each: Plan, settings: Settings, argv: list[str]) -> None:
    """Inside the allocation: every launch in a session of its own."""
    from harness.launch.allocation import report

    store = Store(settings.run_dir)
    for launch in each.launches:
        races = [race for number, race in each.tasks if number == launch]
        with Sessions(each, settings, launch, races) as sessions:
            finish_record = sessions.write_record(store, argv)
            for race in races:
                report({"did": "begin", "text": f"launch {launch}: {describe(race)}", **stamp(race, launch)})
                answers, failed = sessions.run(race, report)
                store_race(store, race, sessions.setting, answers, failed)
                report({"did": "race", "units": _units(race), **stamp(race, launch)})
            finish_record()


def store_race(
    store: Store, race: Race, setting: tidy.Setting, answers: list[Any], failed: Mapping[str, tuple[str, str]]
) -> None:
    """What ranks answered to a race, and the cells that failed in it with status and reason."""
    rows = tidy.rows_of_race(race, setting, answers, failed)
    for cell, timelines in tidy.timelines_of_race(answers).items():
        store.write_trace(cell, timelines)
    store.append(rows)  # last: what has rows is finished


class Sessions:
    """One session after another on the same cluster: a failure ends one, and the next goes on without its cause. Where
    the ranks of one cannot even start, what is left has failed, with that reason."""

    def __init__(self, each: Plan, settings: Settings, launch: int, races: list[Race]):
        self.plan, self.settings, self.launch, self.races = each, settings, launch, races
        self.num_started = 0
        self._open = contextlib.ExitStack()
        self._session: Any = None
        self._no_start: RankFailure | None = None

    def __enter__(self) -> Sessions:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def setting(self) -> tidy.Setting:
        evidence, network = self._where
        return tidy.Setting(self.settings.run_dir.name, self.launch, evidence, network, self.settings.refuse_cpu_bound)

    @property
    def _where(self) -> tuple[str, dict[str, Any]]:
        """Evidence and network; of ranks that never ran, what their cluster is."""
        if self._session is not None:
            return self._session.evidence, dict(self._session.network)
        return tidy.nowhere(self.plan.cluster)

    def run(self, race: Race, report: Callable[[dict[str, Any]], None]) -> tuple[list[Any], dict[str, tuple[str, str]]]:
        """Ranks' answers, and the cells that ended their session with status and reason."""
        failed: dict[str, tuple[str, str]] = {}
        remaining = list(race.experiments)
        while remaining:
            payload = payload_of(race, remaining, self.settings, self.launch)
            failure = self._no_start
            try:
                if failure is None:
                    answers = self._session.call(RUN_RACE, payload, timeout_s=self._timeout_s(race), on_progress=report)
                    return answers, failed
            except RankFailure as error:
                failure = error
            except UserError as error:  # that only a rank could find
                if (failure := error.failure) is None:
                    raise
            assert failure is not None
            told = blamed([e.digest for e in remaining], failure)
            for status, reason in dict.fromkeys(told.values()):
                report({"did": "setback", "text": f"{status}: {reason}"})
            for cell, (status, reason) in told.items():
                failed[cell] = status, reason + self._on_their_way(cell)
            remaining = [experiment for experiment in remaining if experiment.digest not in failed]
            if self._no_start is None:
                self._start()
        return [], failed

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainings that this launch has begun."""
        return checkpoints_of(self.settings, self.launch)

    @property
    def _place(self) -> str:
        return f"launch-{self.launch}-{self.plan.cluster.name}-{self.plan.wire}"

    def _on_their_way(self, cell: str) -> str:
        path = self.checkpoints / cell / "moving.json"
        return f"; experts were changing places, from where and to where is in {path}" if path.exists() else ""

    def write_record(self, store: Store, argv: list[str]) -> Callable[[], None]:
        """What ran where, beside the rows of this launch; to be called when all has run."""
        name = "-".join(filter(None, (self._place, self.settings.part, str(int(time.time())))))
        evidence, network = self._where
        return keep_record(store, name, record_of_launch(self.plan, self.launch, self.races, evidence, network, argv))

    def _start(self) -> None:
        from harness.launch.session import open_session

        self._open.close()
        folder = self.settings.run_dir / "logs" / "-".join(filter(None, (self._place, self.settings.part)))
        ranks = open_session(
            self.plan.cluster,
            log_dir=folder / str(self.num_started),
            wire=self.plan.wire,  # type: ignore[arg-type]
            preload=("harness.bench.race", *self._preload()),
        )
        self.num_started += 1
        try:
            self._session = self._open.enter_context(ranks)
        except RankFailure as failure:
            self._no_start = failure

    def _preload(self) -> list[str]:
        """Slow modules of the packages that race here and are installed, and what an optimizer's first step imports."""
        experiments = [experiment for race in self.races for experiment in race.experiments]
        systems = {registry.system(experiment.system) for experiment in experiments}
        training = {"torch._dynamo"} if any(experiment.phase == "train_step" for experiment in experiments) else set()
        return sorted(training | {name for each in systems if registry.state(each)[1] is None for name in each.preload})

    def _timeout_s(self, race: Race) -> float:
        if self.settings.timeout_s is not None:
            return self.settings.timeout_s
        estimates = (tidy.estimate_s(e, race.repeats, race.warmup) for e in race.experiments)
        return MIN_TIMEOUT_S + 10 * sum(estimates) + sum(drawing_s(e) for e in race.experiments)


def expected_s(experiment: Experiment, race: Race) -> float:
    """About how long a cell takes in one launch."""
    return tidy.estimate_s(experiment, race.repeats, race.warmup) + USUAL_DRAWING * drawing_s(experiment)


def drawing_s(experiment: Experiment) -> float:
    """Seconds at most in which a rank draws the weights of its experts, on the CPU; each system draws its own."""
    model = experiment.model
    num_layers = 1 if experiment.phase in ("exchange", "layer") else model.num_moe_layers
    of_expert = expert_parameters(model)
    return num_layers * math.ceil(model.num_experts / experiment.cluster.num_ranks) * of_expert / DRAWN_PER_S


def blamed(cells: Sequence[str], failure: RankFailure) -> dict[str, tuple[str, str]]:
    """Of ``cells`` (digests), those that a rank's failure ended, with status and reason: the one that its phase names,
    or else all."""
    named = _DIGEST.search(failure.phase)
    guilty = [named[1]] if named and named[1] in cells else list(cells)
    reason = f"rank {failure.rank} in {failure.phase!r}: {failure.message}"
    reason += f" (log: {failure.log_path})" if failure.log_path.name else ""
    return dict.fromkeys(guilty, (STATUS_OF_FAILURE[failure.kind], reason))


def checkpoints_of(settings: Settings, launch: int) -> Path:
    """Folder of the trainings of a launch."""
    return settings.run_dir / "checkpoints" / f"launch-{launch}"


def payload_of(race: Race, experiments: Sequence[Experiment], settings: Settings, launch: int) -> dict[str, Any]:
    """What ``run_race`` takes, for those ``experiments`` of ``race``."""
    distrusted = {}
    if launch and race.first.compute == "stand-in":  # checked in the first launch
        told = Store(settings.run_dir).outcomes()
        distrusted = {cell: reason for (cell, _), (_, status, reason, _) in told.items() if status == "nonconforming"}
    return {
        "launch": launch,
        "distrusted": distrusted,
        "experiments": [experiment.model_dump(mode="json") for experiment in experiments],
        "repeats": race.repeats,
        "warmup": race.warmup,
        "checkpoints": (str(checkpoints_of(settings, launch)), settings.checkpoint_every),
    }


def keep_record(store: Store, name: str, record: dict[str, Any]) -> Callable[[], None]:
    """Store ``record`` now; what comes back stores it again, with the conditions of its GPUs, if any, after the run."""
    store.write_record(name, record)

    def finish() -> None:
        if after := provenance.conditions() if record.get("devices") else []:
            store.write_record(name, {**record, "conditions": {**record["conditions"], "after": after}})

    return finish


def record_of_launch(
    each: Plan, launch: int, races: list[Race], evidence: str, network: dict[str, Any], argv: list[str]
) -> dict[str, Any]:
    """Enough to run ``races`` again, and to know what they ran on."""
    experiments = [experiment for race in races for experiment in race.experiments]
    certificates = {race.digest: tidy.certificate(race.first) for race in races}
    return {
        "launch": launch,
        "date": tidy.now_utc(),
        "argv": argv,
        "experiments": {e.digest: e.model_dump(mode="json") for e in experiments},
        "certificates": {race: found.as_dict() for race, found in certificates.items() if found},
        "seeds": {race.digest: race.first.workload.seed for race in races},
        "repeats": {race.digest: race.repeats for race in races},
        "warmup": {race.digest: race.warmup for race in races},
        "cluster": each.cluster.name,
        "wire": each.wire,
        "evidence": evidence,
        "network": network,
        **provenance.collect(e.system for e in experiments),
    }


def put_aside(run_dir: Path) -> None:
    """Keep an older run under another name."""
    if run_dir.exists():
        aside = run_dir.rename(run_dir.with_name(f"{run_dir.name}.until-{time.strftime('%Y%m%d-%H%M%S')}"))
        shutil.rmtree(aside / lock.FOLDER, ignore_errors=True)


def describe(race: Race) -> str:
    first = race.first
    sent = f", rows {first.exchange_dtype}" if first.exchange_dtype else ""
    return f"{first.phase} of {first.model.name}, {first.workload.name}, on {first.cluster.name}{sent}"


def summary(store: Store, suite: Suite) -> dict[str, int]:
    """Number of (cell, launch) pairs of ``suite`` by status."""
    rows = store.read(damaged="skip")
    cells = [*suite.experiments, *(each.experiment for each in suite.bad)]
    rows = rows[rows["cell"].isin([experiment.digest for experiment in cells])]
    rows = rows[rows["metric"].isin(["time_s", "status"])]
    statuses = rows.groupby(["cell", "launch"])["status"].first()
    return {str(status): int(count) for status, count in statuses.value_counts().items()}


def stamp(race: Race, launch: int) -> dict[str, Any]:
    """What a message of a sweep's job says besides: when, and which race of which launch."""
    return stamp_of(race.digest, launch)


def stamp_of(digest: str, launch: int) -> dict[str, Any]:
    """``stamp`` of what has this digest."""
    return {"at": time.time(), "race": digest, "launch": launch}


def _units(race: Race) -> int:
    return len(race.experiments) * (1 + race.repeats)
