"""Experiment files: a grid of model x cluster x workload x system x phase, checked whole before any work starts.

    name: demo
    defaults: {dtype: bfloat16, repeats: 5, launches: 3}
    experiments:
      - model: local-m1024-e64k8
        cluster: emulated-2x4
        workload: [balanced-512, zipf-4-512]
        system: [megatron, flat, {name: hiermoe-hd2, options: {chunks: 4}}]
        phase: exchange

Names refer to presets; a mapping in the place of a name is a specification of its own, or what changes in a preset
(``{preset: qwen3-30b-a3b, num_layers: 94}``, ``{preset: h100, nodes: 8}``), and so is the name of a YAML
file (relative to this one) that holds such a mapping. A system is a name, a recipe (``hiermoe-hd2+fsmoe+hecate``), or a
recipe written out: ``{exchange: hiermoe-hd2, schedule: fsmoe, state: hecate, options: {t: 4}}``. Lists expand as a
grid. ``seed`` takes the place of the
workload's own.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from harness import presets, recipes, registry
from harness.bench.told import at, check_case, check_layout, nearest
from harness.errors import Unreadable, UserError, bad
from harness.layout import Layout
from harness.specs import SERVING, Cluster, Dtype, Experiment, Model, Phase, Workload
from harness.topology import Topology

_REQUIRED = ("model", "cluster", "workload", "system", "phase")
_DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "options": {},
    "backward": True,
    "wire": "recv_first",
    "compute": "real",
    "exchange_dtype": None,
    "loss_scale": "dynamic",
    "model_parallel": False,
    "layout": {},
    "seed": None,
    "repeats": 5,
    "warmup": 1,
    "launches": 3,
}
KINDS: dict[type[Any], presets.Kind] = {spec: kind for kind, spec in presets.SPECS.items()}
_ENTRY_KEYS = (*_REQUIRED, *_DEFAULTS)
_COUNTS = ("repeats", "warmup", "launches")
_SUITE_KEYS = ("name", "defaults", "experiments")


@dataclasses.dataclass(frozen=True)
class Race:
    """Experiments that are equal in all but the system and its options, run interleaved."""

    experiments: tuple[Experiment, ...]  # in the order of the file
    repeats: int  # timed repetitions (steps, for train_step) of each
    warmup: int
    launches: int

    @property
    def digest(self) -> str:
        return self.experiments[0].race

    @property
    def first(self) -> Experiment:
        """For what all of them share."""
        return self.experiments[0]


@dataclasses.dataclass(frozen=True)
class Bad:
    """A cell that cannot run; ``reason`` names the entry, and the file if one is to blame."""

    experiment: Experiment
    reason: str
    launches: int


@dataclasses.dataclass(frozen=True)
class Suite:
    """``bad``: cells that stand in no race. ``entries``: where each cell was asked for, by its digest. ``sifted``: by
    ``harness.bench.inputs``."""

    name: str
    races: tuple[Race, ...]
    bad: tuple[Bad, ...] = ()
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    sifted: bool = False

    @property
    def experiments(self) -> list[Experiment]:
        return [experiment for race in self.races for experiment in race.experiments]


def names() -> list[str]:
    """Suites that come with moebench."""
    folder = importlib.resources.files("harness.presets") / "suites"
    return sorted(Path(str(file)).stem for file in folder.iterdir() if str(file).endswith(".yaml"))


def load(
    source: Path | str,
    *,
    physical: bool = False,
    strict: bool = True,
    small: bool = False,
    layout: Mapping[str, Any] | None = None,
) -> Suite:
    """The suite called ``source`` or in the YAML file ``source``; a ``UserError`` names the file and the field.
    ``physical``: on any cluster, as nothing is run here. ``strict``: also where one cell alone cannot run; else it
    stands in ``Suite.bad``, unless no good one is left. ``small``: models scaled down (``Model.scaled_down``);
    ``layout``: fields of all layouts, in the place of the file's own."""
    how: dict[str, Any] = {"physical": physical, "strict": strict, "small": small, "layout": layout}
    if str(source) in names():
        text = (importlib.resources.files("harness.presets") / "suites" / f"{source}.yaml").read_text("utf-8")
        return parse(text, f"suites/{source}.yaml", **how)
    path = Path(source)
    if not path.exists() and not presets.is_file(str(source)):
        raise bad("suite", str(source), f"unknown{nearest(str(source), names())}; or give a YAML file")
    data = presets.read_yaml(path, "experiments file")
    return from_data(data, str(path), folder=path.parent, **how)


def parse(text: str, where: str, **how: Any) -> Suite:
    """``text`` of an experiments file; ``where`` is its name in error messages; the others as in ``load``."""
    return from_data(presets.parse_yaml(text, where), where, **how)


def checked_name(field: str, name: Any) -> str:
    """``name`` if a run's folder may be called so."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise bad(field, name, "must be a word of letters, digits, '.', '_' and '-'")
    return name


def from_data(
    data: Any,
    where: str,
    *,
    folder: Path | None = None,
    distinct: bool = False,
    physical: bool = False,
    strict: bool = True,
    small: bool = False,
    layout: Mapping[str, Any] | None = None,
) -> Suite:
    """The same from what the file in ``folder`` holds. ``distinct``: two cells with one identity are an error, and not
    one cell; ``physical``: a physical cluster may stand there, because an allocation has it or nothing is run."""
    if not isinstance(data, Mapping):
        raise bad(where, data, f"must be a mapping with {', '.join(_SUITE_KEYS)}")
    _check_keys(data, _SUITE_KEYS, where)
    name = checked_name(f"{where}: name", data.get("name"))
    entries = data.get("experiments")
    if not isinstance(entries, list) or not entries:
        raise bad(f"{where}: experiments", entries, "must be a list of at least one mapping")
    defaults = data.get("defaults") or {}
    _check_entry(defaults, f"{where}: defaults")
    races: dict[str, Race] = {}
    bad_cells: dict[str, Bad] = {}
    places: dict[str, str] = {}
    for index, entry in enumerate(entries):
        here = f"{where}: experiments[{index}]"
        _check_entry(entry, here)
        fields = {**_DEFAULTS, **defaults, **entry}
        if layout:
            own = fields["layout"] if isinstance(fields["layout"], list) else [fields["layout"]]
            fields["layout"] = [{**each, **layout} if isinstance(each, Mapping) else each for each in own]
        for key in _REQUIRED:
            if key not in fields:
                raise bad(here, dict(entry), f"has no {key}; give it here or under defaults")
        for choice in _grid(fields):
            experiment = _experiment(choice, here, folder, small)
            places.setdefault(experiment.digest, here)
            try:
                _add(races, choice, experiment, here, distinct, physical)
            except Unreadable:
                raise
            except UserError as error:
                if strict:
                    raise
                bad_cells.setdefault(experiment.digest, Bad(experiment, str(error), choice["launches"]))
    if bad_cells and not races:
        raise UserError(next(iter(bad_cells.values())).reason)
    return Suite(name, tuple(races.values()), tuple(bad_cells.values()), places)


def _add(
    races: dict[str, Race], choice: dict[str, Any], experiment: Experiment, here: str, distinct: bool, physical: bool
) -> None:
    """Put one resolved cell into its race; what several entries ask of one race, the most demanding decides."""
    counts = {key: choice[key] for key in _COUNTS}
    known = races.get(experiment.race)
    if known is None:
        check_case(experiment, here, physical)
    check_layout(experiment, here)
    if known is None:
        races[experiment.race] = Race((experiment,), **counts)
        return
    if distinct and experiment in known.experiments:
        same = f"{experiment.system} on {experiment.workload.name}, {experiment.cluster.name}"
        raise bad(here, same, f"is in this file twice (identity {experiment.digest}); leave one out or change a field")
    experiments = known.experiments if experiment in known.experiments else (*known.experiments, experiment)
    races[experiment.race] = Race(experiments, **{key: max(counts[key], getattr(known, key)) for key in _COUNTS})


def _grid(fields: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Every combination; the last field varies fastest."""
    lists = [value if isinstance(value, list) else [value] for value in fields.values()]
    for values in itertools.product(*lists):
        yield dict(zip(fields, values, strict=True))


def _experiment(choice: dict[str, Any], here: str, folder: Path | None, small: bool) -> Experiment:
    with at(here):
        system, options = _system(choice, here)
        known = registry.system(str(system))
        system = known.name
        fields = {
            "model": _resolve(choice["model"], presets.model, Model, f"{here}.model", folder),
            "cluster": _resolve(choice["cluster"], presets.cluster, Cluster, f"{here}.cluster", folder),
            "workload": _resolve(choice["workload"], presets.workload, Workload, f"{here}.workload", folder),
        }
        fields["layout"] = _layout(choice["layout"], fields["cluster"], here)
    if small:
        fields["model"] = fields["model"].scaled_down()
    if choice["seed"] is not None:
        _check_count(choice["seed"], f"{here}.seed", 0)
        if choice["seed"] != (own := fields["workload"]).seed:
            fields["workload"] = own.model_copy(
                update={"seed": choice["seed"], "name": f"{own.name}-s{choice['seed']}"}
            )
    for option in options:
        if option not in known.options:
            why = recipes.no_option(known, option)
            remedy = f"{system} has no such option{f': {why}' if why else nearest(option, known.options)}"
            raise bad(f"{here}.options.{option}", options[option], remedy)
    for key, values in (("phase", get_args(Phase)), ("dtype", get_args(Dtype))):
        if choice[key] not in values:
            raise bad(f"{here}.{key}", choice[key], f"must be one of {', '.join(values)}")
    same = ("phase", "dtype", "backward", "wire", "compute", "exchange_dtype", "loss_scale", "model_parallel")
    fields |= {key: choice[key] for key in same}
    if choice["phase"] in SERVING:
        fields["backward"] = False
    experiment: Experiment = Experiment.parse({**fields, "system": system, "options": dict(options)}, here)
    return experiment


def _layout(given: Any, cluster: Cluster, here: str) -> Layout:
    if not isinstance(given, Mapping):
        raise bad(f"{here}.layout", given, "must be a mapping from field to value, as {expert_parallel: 4}")
    layout: Layout = Layout.parse(given, f"{here}.layout")
    return layout.on(Topology(cluster.shape))


def _system(choice: dict[str, Any], here: str) -> tuple[Any, dict[str, Any]]:
    """Name and options; a system's own options come on top of those of the entry."""
    given = choice["system"]
    if not isinstance(given, Mapping):
        given = {"name": given}
    slots = {key: value for key, value in given.items() if key in recipes.SLOTS}
    if slots and "name" in given:
        raise bad(f"{here}.system.name", given["name"], f"the {next(iter(slots))} says it already; leave one out")
    _check_keys(given, (*recipes.SLOTS, "name", "options"), f"{here}.system")
    for options in (choice["options"], given.get("options", {})):
        if not isinstance(options, Mapping):
            raise bad(f"{here}.options", options, "must be a mapping from option to value")
    name = recipes.name_of(recipes.written(slots, f"{here}.system")) if slots else given.get("name")
    return name, {**choice["options"], **given.get("options", {})}


def _resolve(value: Any, preset: Callable[..., Any], spec: type[Any], here: str, folder: Path | None) -> Any:
    if isinstance(value, Mapping) and "preset" in value:
        return presets.based(KINDS[spec], value, here)
    if isinstance(value, Mapping):
        return spec.parse(value, here) if "name" in value else presets.unnamed(KINDS[spec], value, here)
    if not isinstance(value, str):
        raise bad(here, value, "must be the name of a preset, a YAML file, or a mapping")
    return preset(value, folder)


def _check_entry(entry: Any, here: str) -> None:
    if not isinstance(entry, Mapping):
        raise bad(here, entry, f"must be a mapping with some of {', '.join(_ENTRY_KEYS)}")
    for field in Layout.model_fields:
        if field in entry:
            raise bad(
                f"{here}.{field}", entry[field], f"belongs to the layout; write layout: {{{field}: {entry[field]}}}"
            )
    _check_keys(entry, _ENTRY_KEYS, here)
    for key, value in entry.items():
        if value is None or value == []:
            raise bad(f"{here}.{key}", value, "is empty; give a value or leave the key out")
        if key in _COUNTS:
            _check_count(value, f"{here}.{key}", 0 if key == "warmup" else 1)


def _check_keys(data: Mapping[Any, Any], known: Iterable[str], here: str) -> None:
    for key in data:
        if key not in known:
            raise bad(f"{here}.{key}", data[key], "unknown key" + nearest(str(key), known))


def _check_count(value: Any, here: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise bad(here, value, f"must be a whole number of at least {least}")
