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
import difflib
import functools
import importlib.resources
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from harness import presets, recipes, registry
from harness.bench import serve
from harness.case import placements
from harness.errors import Unreadable, UserError, bad
from harness.presets import this_machine
from harness.routing import KNOWN_GENERATORS, make_routing
from harness.routing.make import file_of
from harness.specs import SERVING, Cluster, Dtype, Experiment, Model, Phase, Ragged, Workload
from harness.topology import Topology, check_size

_REQUIRED = ("model", "cluster", "workload", "system", "phase")
_DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "options": {},
    "backward": True,
    "wire": "recv_first",
    "compute": "real",
    "loss_scale": "dynamic",
    "model_parallel": False,
    "seed": None,
    "repeats": 5,
    "warmup": 1,
    "launches": 3,
}
KINDS: dict[type[Any], presets.Kind] = {spec: kind for kind, spec in presets.SPECS.items()}
_ENTRY_KEYS = (*_REQUIRED, *_DEFAULTS)
_COUNTS = ("repeats", "warmup", "launches")
_SUITE_KEYS = ("name", "defaults", "experiments")
MOST_LAYERS, MOST_LOADS, MOST_CHOICES = 4096, 1 << 26, 1 << 28  # of a step; of a layer


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


def load(source: Path | str, *, physical: bool = False, strict: bool = True, small: bool = False) -> Suite:
    """The suite called ``source`` or in the YAML file ``source``; a ``UserError`` names the file and the field.
    ``physical``: on any cluster, as nothing is run here. ``strict``: also where one cell alone cannot run; else it
    stands in ``Suite.bad``, unless no good one is left. ``small``: models scaled down (``Model.scaled_down``)."""
    if str(source) in names():
        text = (importlib.resources.files("harness.presets") / "suites" / f"{source}.yaml").read_text("utf-8")
        return parse(text, f"suites/{source}.yaml", physical=physical, strict=strict, small=small)
    path = Path(source)
    if not path.exists() and not presets.is_file(str(source)):
        raise bad("suite", str(source), f"unknown{_nearest(str(source), names())}; or give a YAML file")
    data = presets.read_yaml(path, "experiments file")
    return from_data(data, str(path), folder=path.parent, physical=physical, strict=strict, small=small)


def parse(text: str, where: str, *, physical: bool = False, strict: bool = True, small: bool = False) -> Suite:
    """``text`` of an experiments file; ``where`` is its name in error messages; the others as in ``load``."""
    return from_data(presets.parse_yaml(text, where), where, physical=physical, strict=strict, small=small)


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
        _check_case(experiment, here, physical)
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
    with _at(here):
        system, options = _system(choice, here)
        known = registry.system(str(system))
        system = known.name
        fields = {
            "model": _resolve(choice["model"], presets.model, Model, f"{here}.model", folder),
            "cluster": _resolve(choice["cluster"], presets.cluster, Cluster, f"{here}.cluster", folder),
            "workload": _resolve(choice["workload"], presets.workload, Workload, f"{here}.workload", folder),
        }
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
            remedy = f"{system} has no such option{f': {why}' if why else _nearest(option, known.options)}"
            raise bad(f"{here}.options.{option}", options[option], remedy)
    for key, values in (("phase", get_args(Phase)), ("dtype", get_args(Dtype))):
        if choice[key] not in values:
            raise bad(f"{here}.{key}", choice[key], f"must be one of {', '.join(values)}")
    fields |= {
        key: choice[key] for key in ("phase", "dtype", "backward", "wire", "compute", "loss_scale", "model_parallel")
    }
    if choice["phase"] in SERVING:
        fields["backward"] = False
    experiment: Experiment = Experiment.parse({**fields, "system": system, "options": dict(options)}, here)
    return experiment


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


def _check_case(experiment: Experiment, here: str, physical: bool) -> None:
    """What can be told without a rank: the routing exists, and the experts divide."""
    workload, topology = experiment.workload, Topology(experiment.cluster.shape)
    with _at(here):
        check_size(experiment.cluster.name, experiment.cluster.shape)
        _check_amounts(experiment, topology.num_ranks)
        if experiment.cluster.kind == "physical" and not (physical or this_machine.made(experiment.cluster)):
            remedy = (
                "is of kind physical: moebench simulate prices it, moebench sweep runs it on Slurm; "
                "here run one-gpu, gpu-node, or a cluster of kind local or emulated"
            )
            raise bad("cluster", experiment.cluster.name, remedy)
        if experiment.phase in SERVING:
            _check_served(experiment)
        may_choose = experiment.phase in ("train_step", *SERVING) or (
            experiment.phase == "layer" and not experiment.model.takes_routing
        )
        if workload.generator == "natural" and not may_choose:
            raise bad("workload", workload.name, f"has no prescribed routing; phase {experiment.phase} needs one")
        if workload.generator not in KNOWN_GENERATORS:
            raise bad(
                "workload.generator", workload.generator, "unknown" + _nearest(workload.generator, KNOWN_GENERATORS)
            )
        for level, link in enumerate(experiment.cluster.levels):
            if experiment.model.num_experts % (num_groups := topology.num_units(level)):
                found = (
                    f"is not divisible by the {num_groups} groups of link level {link.name!r}; change one of the two"
                )
                raise bad("model.num_experts", experiment.model.num_experts, found)
        if experiment.phase in ("train_step", "prefill"):
            for tokens in set(workload.tokens(topology.num_ranks)):
                if tokens % experiment.model.seq:
                    remedy = f"must be a multiple of model.seq = {experiment.model.seq}"
                    if isinstance(workload.tokens_per_rank, Ragged):
                        remedy += "; give it as tokens_per_rank.multiple"
                    raise bad("workload.tokens_per_rank", tokens, remedy)
        if workload.generator == "trace" and workload.params.get("replay") and not experiment.goes_on:
            remedy = f"has no step after step in phase {experiment.phase}; replay in train_step, prefill or decode"
            raise bad("workload.params.replay", True, remedy)
        of_all = file_of(workload) is not None and experiment.phase in ("train_step", *SERVING)
        _draw(workload, experiment.model, topology, experiment.model.num_moe_layers if of_all else 1)


@functools.lru_cache(maxsize=64)  # the systems of a race have the same
def _draw(workload: Workload, model: Model, topology: Topology, num_layers: int) -> None:
    """Whether there is a routing."""
    for layer in range(num_layers):
        make_routing(workload, model, topology, layer=layer)


def _check_amounts(experiment: Experiment, num_ranks: int) -> None:
    """Nobody meant as much as no memory holds."""
    model, workload = experiment.model, experiment.workload
    choices = sum(workload.tokens(num_ranks)) * model.top_k
    for field, value, amount, most, what in (
        ("model.num_layers", model.num_layers, model.num_layers, MOST_LAYERS, "layers of a step"),
        ("model.num_experts", model.num_experts, model.num_experts * num_ranks, MOST_LOADS, "loads, ranks by experts"),
        ("workload.tokens_per_rank", workload.tokens_per_rank, choices, MOST_CHOICES, "expert choices in a layer"),
    ):
        if amount > most:
            raise bad(field, value, f"makes {amount:,} {what}, and at most {most:,} are planned; give fewer")


def _check_served(experiment: Experiment) -> None:
    """A server's tokens come as they come: nothing is dropped, and no expert picks among them."""
    model = experiment.model
    if not model.takes_routing:
        raise bad("model.gate", model.gate, f"in phase {experiment.phase} each token chooses its experts by itself")
    if model.capacity_factor is not None:
        raise bad("model.capacity_factor", model.capacity_factor, f"in phase {experiment.phase} nothing is dropped")
    if experiment.model_parallel:
        num_local = math.prod(experiment.cluster.shape[1:])
        for field, heads in (("num_heads", model.num_heads), ("num_kv_heads", model.num_kv_heads or model.num_heads)):
            if heads % num_local:
                raise bad(f"model.{field}", heads, f"does not divide over the {num_local} ranks of a node")
        tokens = experiment.workload.tokens(num_local * experiment.cluster.shape[0])
        if any(len(set(tokens[at : at + num_local])) > 1 for at in range(0, len(tokens), num_local)):
            remedy = "must be the same on all ranks of a node whose attention is shared out (model_parallel)"
            raise bad("workload.tokens_per_rank", experiment.workload.tokens_per_rank, remedy)
    if experiment.phase == "decode" and model.seq < 2:
        raise bad("model.seq", model.seq, "leaves no token before the decoded one; at least 2")
    serve.stored_arrays(experiment)
    placements(experiment)


def _check_entry(entry: Any, here: str) -> None:
    if not isinstance(entry, Mapping):
        raise bad(here, entry, f"must be a mapping with some of {', '.join(_ENTRY_KEYS)}")
    _check_keys(entry, _ENTRY_KEYS, here)
    for key, value in entry.items():
        if value is None or value == []:
            raise bad(f"{here}.{key}", value, "is empty; give a value or leave the key out")
        if key in _COUNTS:
            _check_count(value, f"{here}.{key}", 0 if key == "warmup" else 1)


def _check_keys(data: Mapping[Any, Any], known: Iterable[str], here: str) -> None:
    for key in data:
        if key not in known:
            raise bad(f"{here}.{key}", data[key], "unknown key" + _nearest(str(key), known))


def _nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...' with the known words."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" known: {', '.join(known) or 'none'}"


def _check_count(value: Any, here: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise bad(here, value, f"must be a whole number of at least {least}")


class _at:
    """Put the file and the field before the message of a ``UserError`` from elsewhere that does not name them."""

    def __init__(self, here: str):
        self.here = here

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            text = str(error)
            raise type(error)(text if text.startswith(self.here) else f"{self.here}: {text}") from None
