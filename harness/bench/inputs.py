"""Every input of every cell is read before any rank starts: what one cell cannot run with costs that cell alone."""

from __future__ import annotations

import dataclasses

from harness.bench import dry, tidy
from harness.bench.store import Store
from harness.bench.suite import Bad, Race, Suite
from harness.errors import OF_A_SYSTEM, Unreadable, UserError, unplannable
from harness.specs import Experiment


def sift(suite: Suite) -> Suite:
    """``suite`` with its bad cells apart: those that no session, no system, no option and no file allows. ``UserError``
    where none is left, and for a file that cannot be read at all; it names the entry and the file."""
    if suite.sifted:
        return suite
    clusters = {race.first.cluster.digest: race.first.cluster for race in suite.races}
    lacks = {digest: dry.lacking(cluster) for digest, cluster in clusters.items()}
    races, bad = [], list(suite.bad)
    for race in suite.races:
        good = []
        for experiment in race.experiments:
            entry = suite.entries.get(experiment.digest, suite.name)
            reason = lacks[experiment.cluster.digest] or wrong(experiment, entry) or too_long(experiment, race)
            if reason is None:
                good.append(experiment)
            else:
                bad.append(Bad(experiment, f"{entry}: {reason}", race.launches))
        if good:
            races.append(dataclasses.replace(race, experiments=tuple(good)))
    if not races and bad:
        raise UserError(bad[0].reason)
    return dataclasses.replace(suite, races=tuple(races), bad=tuple(bad), sifted=True)


def too_long(experiment: Experiment, race: Race) -> str | None:
    """Why a replay does not last for the whole race; None if it does, or where nothing is replayed."""
    if experiment.workload.generator != "trace":
        return None
    from harness.routing.replay import check_replay  # pyarrow only where a trace is read

    extra = int(experiment.phase == "train_step")  # in which memory is counted
    steps, words = max(1, race.warmup) + race.repeats + extra, f"{max(1, race.warmup)} warm-up, {race.repeats} repeats"
    try:
        check_replay(experiment, steps, words + (", 1 to count memory" if extra else ""))
    except UserError as error:
        return str(error)
    return None


def wrong(experiment: Experiment, entry: str) -> str | None:
    """Why a cell cannot even be planned, in the words of what went wrong; None if it can."""
    try:
        dry.refusal(experiment)
        tidy.estimate_s(experiment, 1, 1)
    except Unreadable as error:
        raise Unreadable(f"{entry}: {error}") from None
    except UserError as error:
        return str(error)
    except OF_A_SYSTEM as error:
        return unplannable(experiment.system, error)
    return None


def store_bad(store: Store, suite: Suite, launches: int | None) -> None:
    """A row for each bad cell in each launch, unless it is told already; it is tried again when the run goes on."""
    told = store.outcomes()
    for each in suite.bad:
        experiment = each.experiment
        evidence, network = tidy.nowhere(experiment.cluster)
        for launch in range(launches or each.launches):
            known = told.get((experiment.digest, launch))
            if known is None or known[2] != each.reason[:500]:
                setting = tidy.Setting(store.path.name, launch, evidence, network)
                race = Race((experiment,), 1, 0, each.launches)
                store.append(tidy.rows_of_race(race, setting, [], {experiment.digest: ("failed", each.reason)}))
