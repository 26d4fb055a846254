"""Systems as recipes: any exchange with any schedule, expert state and placement.

A recipe is written out, ``{exchange: hiermoe-hd2, schedule: fsmoe, state: hecate, placement: smartmoe}``, or short,
``hiermoe-hd2+fsmoe+hecate``: each name gives one slot, in any order, and the others hold their defaults. Files of
``baselines`` and ``methods`` bring what slots may hold, by name:

    EXCHANGES   ``ExchangeSlot``: how rows travel
    SCHEDULES   ``ScheduleSlot``: in which order hops and experts stand on the lanes
    STATES      native systems: who holds which expert's parameters, and which copies there are
    PLACINGS    bases of systems (``harness.plan.placings``): where experts go; and all planners of ``moebench place``

A name that stands in several slots gives the one that its file says (``SHORT``), else the first of ``FIRST``;
``schedule=name`` gives the other one. One recipe has one name, and where a system is that recipe (``recipe`` of native
systems), that system's. A part may say why it does not go with others: ``clashes(parts)``, by slot.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from harness import registry
from harness.errors import bad, unknown
from harness.plan.native import NativeSystem
from harness.plan.placings import Placing, served
from harness.plan.slots import COMMON, ExchangeSlot, FlatSlot, Pipelined, ScheduleSlot, Serial
from harness.system import Case, System

#: slots in the order of a recipe's name, and what a file calls what it brings for each
SLOTS = {"exchange": "EXCHANGES", "schedule": "SCHEDULES", "state": "STATES", "placement": "PLACINGS"}
FIRST = ("schedule", "exchange", "state", "placement")
#: what a slot holds that a recipe leaves out
DEFAULTS = {"exchange": "flat", "schedule": "serial", "state": "owned", "placement": "contiguous"}


class Owned(NativeSystem):
    """Experts stay with their owners."""

    title = "each expert on its owner alone"
    source = "expert parallelism of GShard (arXiv 2006.16668)"


class Contiguous:
    """Experts in index order; a state may move them."""

    title = "experts in index order; a state may move them"
    source = "as Megatron-LM"


@functools.cache
def known(slot: str) -> dict[str, Any]:
    """What may stand in a slot, by name; its default first."""
    own: dict[str, dict[str, Any]] = {
        "exchange": {"flat": FlatSlot()},
        "schedule": {"serial": Serial(), "pipelined": Pipelined()},
        "state": {"owned": Owned},
        "placement": {"contiguous": Contiguous},
    }
    found = registry.attributes(SLOTS[slot], functools.partial(_wrong, slot))
    if slot == "placement":
        from harness.placing import placers

        found = {name: served(name, each.title) for name, each in placers().items()} | found
    return own[slot] | {name: part for name, part in found.items() if name not in own[slot]}


def _wrong(slot: str, name: Any, part: Any) -> str:
    """What is, of a file's part for a slot; empty: nothing."""
    kind: Any = {"exchange": ExchangeSlot, "schedule": ScheduleSlot, "state": NativeSystem, "placement": System}[slot]
    lack = [each for each in ("title", "source") if not isinstance(getattr(part, each, None), str)]
    if slot in ("exchange", "schedule"):
        fits = isinstance(part, kind)
    else:
        fits = inspect.isclass(part) and issubclass(part, kind)
    if not fits:
        return f"is no {kind.__name__}"
    if not isinstance(name, str) or not registry.NAME.fullmatch(name):
        return "has no name of letters, digits, '.', '_' and '-'"
    return f"has no {', no '.join(lack)}" if lack else ""


@functools.cache
def gives() -> dict[str, str]:
    """The slot that each name gives alone."""
    first = {name: slot for slot in reversed(FIRST) for name in known(slot)}
    said = registry.attributes("SHORT")
    return first | {name: slot for name, slot in said.items() if name in known(slot)}


# ------------------------------------------------------------------------------------------------ from words to slots


def parse(text: str) -> dict[str, str]:
    """``text``: names joined by + -> what each slot holds that they give."""
    found: dict[str, str] = {}
    for part in text.split("+"):
        slot, equals, name = part.rpartition("=")
        slot = _slot(slot) if equals else _slot_of(text, name)
        _check(slot, name)
        if slot in found:
            same = "it is named twice" if found[slot] == name else f"{found[slot]!r} does so too; take one"
            more = f", or give another slot ({_others(name, slot)})" if _others(name, slot) else ""
            raise bad(f"system {text}", name, f"gives the {slot} of the recipe, and {same}{more}")
        found[slot] = name
    return found


def written(recipe: Mapping[Any, Any], field: str = "system") -> dict[str, str]:
    """A recipe that is written out, checked."""
    for slot, name in recipe.items():
        _check(_slot(slot, field), name, field)
    return dict(recipe)


def _slot(name: Any, field: str = "system") -> str:
    if name not in SLOTS:
        raise unknown(field, str(name), SLOTS, "slots")
    return str(name)


def _check(slot: str, name: Any, field: str = "system") -> None:
    if not isinstance(name, str) or name not in known(slot):
        raise unknown(f"{field}.{slot}", str(name), known(slot), f"names for the slot {slot}")


def _slot_of(text: str, name: str) -> str:
    if name in gives():
        return gives()[name]
    if (own := registry.systems().get(name)) is not None:
        recipe = vars(own).get("recipe")
        parts = "it gives no slot" if recipe is None else f"its parts are {'+'.join(recipe.values())}"
        raise bad(f"system {text}", name, f"is a system of its own and no part of a recipe; {parts}")
    raise unknown(f"system {text}", name, gives(), "parts of recipes")


def _others(name: str, slot: str) -> str:
    return ", ".join(f"{each}={name}" for each in SLOTS if each != slot and name in known(each))


def name_of(recipe: Mapping[str, str]) -> str:
    """The one name of a recipe."""
    whole = DEFAULTS | dict(recipe)
    if (name := _named().get(tuple(whole.values()))) is not None:
        return name
    other = {slot: name for slot, name in whole.items() if name != DEFAULTS[slot]}
    if len(other) < 2:  # a name alone would be a system's
        other |= {"schedule": whole["schedule"]} if "exchange" in other else {"exchange": whole["exchange"]}
    return "+".join(
        other[slot] if gives()[other[slot]] == slot else f"{slot}={other[slot]}" for slot in SLOTS if slot in other
    )


@functools.cache
def _named() -> dict[tuple[str, ...], str]:
    """Systems that are recipes, by what their slots hold."""
    said = {name: vars(system).get("recipe") for name, system in registry.systems().items()}
    return {tuple((DEFAULTS | dict(own)).values()): name for name, own in said.items() if own is not None}


# ------------------------------------------------------------------------------------------------ from slots to systems


def system(text: str) -> type[System]:
    """The system of a recipe's short name, in any order."""
    return made(parse(text))


def made(recipe: Mapping[str, str]) -> type[System]:
    name = name_of(recipe)
    whole = DEFAULTS | dict(recipe)
    return registry.systems().get(name) or _composed(name, tuple(whole[slot] for slot in SLOTS))


@functools.cache
def _composed(name: str, names: tuple[str, ...]) -> type[System]:
    recipe = dict(zip(SLOTS, names, strict=True))
    parts = {slot: known(slot)[each] for slot, each in recipe.items()}
    exchange, schedule, state, placing = parts.values()
    options = {key: text for part in parts.values() for key, text in own_options(part).items()}
    if issubclass(placing, Placing):
        options = {key: text for key, text in options.items() if key not in state.still}
    reason = clash(recipe)

    def refuse(cls: type[System], case: Case) -> str | None:
        return reason or super(composed, cls).refuse(case)  # type: ignore[misc]

    sources = dict.fromkeys(part.source for slot, part in parts.items() if recipe[slot] != DEFAULTS[slot])
    members = {
        "name": name,
        "title": ", ".join(f"{slot} {each}" for slot, each in recipe.items()),
        "source": "; ".join(sources) or Owned.source,
        "exchange": exchange,
        "schedule": schedule,
        "stages": exchange.stages,
        "options": options,
        "chunked": dict(schedule.chunked),
        "variants": _variants(state, placing, options),
        "refuse": classmethod(refuse),
        "recipe": recipe,
        "__module__": __name__,
    }
    composed: type[System] = type(name, (state,) if placing is Contiguous else (placing, state), members)
    return composed


def own_options(part: Any) -> Mapping[str, str]:
    """Of one slot alone."""
    found: Mapping[str, str] = getattr(part, "slot_options", None) or getattr(part, "options", {})
    own = {key: text for key, text in found.items() if key not in COMMON}
    return {**own, **COMMON} if isinstance(part, ScheduleSlot) else own


def _variants(state: Any, placing: Any, options: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of the state, with experts that move."""
    also = getattr(placing, "variant", {})
    found = {name: {**given, **also} for name, given in state.variants.items()} or ({"moved": also} if also else {})
    return {name: {key: each for key, each in given.items() if key in options} for name, given in found.items()}


def clash(recipe: Mapping[str, str]) -> str | None:
    """Why its parts do not go together."""
    whole = DEFAULTS | dict(recipe)
    parts = {slot: known(slot)[name] for slot, name in whole.items()}
    reaches, takes = parts["exchange"].reaches, parts["state"].takes
    if reaches != takes:
        words = {"rank": "one rank that holds its expert", "node": "all ranks of the expert's node"}
        brings = f"the exchange {whole['exchange']} brings a row to {words[reaches]}"
        return f"{brings}, the state {whole['state']} needs it on {words[takes]}"
    for slot, part in parts.items():
        check = getattr(part, "clashes", None)
        if check is not None and (reason := check(parts)):
            return f"the {slot} {whole[slot]} does not go with this recipe: {reason}"
    return None


def no_option(system: type[System], option: str) -> str | None:
    """Why a recipe has no ``option`` that others have, in words."""
    recipe = getattr(system, "recipe", None)
    if recipe is None:
        return None
    for slot, name in (DEFAULTS | dict(recipe)).items():
        if option in own_options(known(slot)[name]):
            return f"option {option!r} of the {slot} {name} is not for this recipe, whose placement moves experts"
    for slot in SLOTS:
        for name, part in known(slot).items():
            if option in own_options(part):
                return f"option {option!r} belongs to the {slot} {name}, which this recipe does not have"
    return None


def rows() -> list[dict[str, Any]]:
    """What slots may hold; ``short``: what stands for it in a short name."""
    return [
        {
            "slot": slot,
            "name": name,
            "short": name if gives()[name] == slot else f"{slot}={name}",
            "default": name == DEFAULTS[slot],
            "what": part.title,
            "options": dict(own_options(part)),
            "source": part.source,
        }
        for slot in SLOTS
        for name, part in known(slot).items()
    ]


__all__ = [
    "DEFAULTS", "SLOTS", "clash", "gives", "known", "made", "name_of", "no_option", "parse", "rows",
    "system", "written",
]  # fmt: skip
