"""Systems as recipes: any exchange with any schedule, expert state and placement.

A recipe is written out, ``{exchange: hiermoe-hd2, schedule: fsmoe, state: hecate, placement: smartmoe}``, or short,
``hiermoe-hd2+fsmoe+hecate``: each name gives one slot, in any order. Files of ``baselines`` and ``methods`` bring what
the slots may hold, by name: ``EXCHANGES`` (``ExchangeSlot``), ``SCHEDULES`` (``ScheduleSlot``), ``STATES`` (native
systems that say what copies there are) and ``PLACINGS`` (bases that say where experts go). A name that stands in
several gives the first of these slots.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from harness import registry
from harness.errors import bad, unknown
from harness.plan.native import NativeSystem
from harness.plan.slots import FlatSlot, Pipelined, Serial
from harness.system import Case, System

#: slots in the order in which a recipe names them, and what a file calls what it brings for each
SLOTS = {"schedule": "SCHEDULES", "exchange": "EXCHANGES", "state": "STATES", "placement": "PLACINGS"}
ORDER = ("exchange", "schedule", "state", "placement")
#: what a slot holds that a recipe leaves out
DEFAULTS = {"exchange": "flat", "schedule": "serial", "state": "owned", "placement": "contiguous"}


class Contiguous:
    """Experts in index order; a state may move them."""


class Owned(NativeSystem):
    """Experts stay with their owners."""


@functools.cache
def known(slot: str) -> dict[str, Any]:
    """What may stand in a slot, by name."""
    own: dict[str, dict[str, Any]] = {
        "exchange": {"flat": FlatSlot()},
        "schedule": {"serial": Serial(), "pipelined": Pipelined()},
        "state": {"owned": Owned},
        "placement": {"contiguous": Contiguous},
    }
    return own[slot] | registry.attributes(SLOTS[slot])


def parse(text: str) -> dict[str, str]:
    """``text``: names joined by + -> what each slot holds. ``UserError`` for an unknown name, and for a slot that two
    names give."""
    found: dict[str, str] = {}
    for name in text.split("+"):
        slot = next((slot for slot in SLOTS if name in known(slot)), None)
        if slot is None:
            every = {each: None for slot in SLOTS for each in known(slot)}
            raise unknown("system", name, every, "parts of a recipe")
        if slot in found:
            taken = f"gives the {slot} of the recipe, as {found[slot]!r} does; take one, or write the slots out"
            raise bad(f"system {text}", name, taken)
        found[slot] = name
    return found


def written(recipe: Mapping[str, Any]) -> str:
    """The short name of a recipe that is written out: ``slot=name`` where a name alone would give another slot."""
    parts = []
    for slot, name in recipe.items():
        if slot not in SLOTS:
            raise unknown("system", str(slot), ORDER, "slots")
        if not isinstance(name, str) or name not in known(slot):
            raise unknown(f"system.{slot}", str(name), known(slot), f"names for the slot {slot}")
    for slot in ORDER:
        name = recipe.get(slot, DEFAULTS[slot])
        if name != DEFAULTS[slot]:
            parts.append(name if next(s for s in SLOTS if name in known(s)) == slot else f"{slot}={name}")
    return "+".join(parts) if len(parts) > 1 else "+".join([*parts, "serial"])


def system(text: str) -> type[System]:
    """The system of a recipe's short name."""
    return _composed(tuple(sorted(parse_all(text).items())))


def parse_all(text: str) -> dict[str, str]:
    """``parse``, where a part may name its slot: ``schedule=fastermoe``."""
    named, rest = {}, []
    for part in text.split("+"):
        slot, equals, name = part.partition("=")
        if not equals:
            rest.append(part)
            continue
        if slot not in SLOTS:
            raise unknown("system", slot, ORDER, "slots")
        if name not in known(slot):
            raise unknown(f"system.{slot}", name, known(slot), f"names for the slot {slot}")
        named[slot] = name
    found = parse("+".join(rest)) if rest else {}
    if both := named.keys() & found.keys():
        slot = min(both)
        raise bad(f"system {text}", found[slot], f"gives the {slot} of the recipe, as {named[slot]!r} does; take one")
    return named | found


@functools.cache
def _composed(slots: tuple[tuple[str, str], ...]) -> type[System]:
    recipe = DEFAULTS | dict(slots)
    exchange, schedule = known("exchange")[recipe["exchange"]], known("schedule")[recipe["schedule"]]
    state, placing = known("state")[recipe["state"]], known("placement")[recipe["placement"]]
    options = {**exchange.options, **schedule.options, **_options(state), **_options(placing)}
    name = written(recipe)
    reason = clash(recipe)

    def refuse(cls: type[System], case: Case) -> str | None:
        return reason or super(made, cls).refuse(case)  # type: ignore[misc]

    members = {
        "name": name,
        "title": ", ".join(f"{slot} {recipe[slot]}" for slot in ORDER),
        "source": "a recipe",
        "exchange": exchange,
        "schedule": schedule,
        "stages": exchange.stages,
        "options": options,
        "chunked": dict(schedule.chunked),
        "variants": {key: given for key, given in state.variants.items() if given.keys() <= options.keys()},
        "refuse": classmethod(refuse),
        "__module__": __name__,
        "recipe": recipe,
    }
    bases = (state,) if placing is Contiguous else (placing, state)
    made: type[System] = type(name, bases, members)
    return made


def _options(part: Any) -> Mapping[str, str]:
    """Of a slot alone."""
    return getattr(part, "slot_options", getattr(part, "options", {}))


def clash(recipe: Mapping[str, str]) -> str | None:
    """Why two slots do not go together."""
    state, placing = known("state")[recipe["state"]], known("placement")[recipe["placement"]]
    for part, other, slot in ((state, placing, "placement"), (placing, state, "state")):
        check = getattr(part, "clashes", None)
        if other is not Contiguous and other is not Owned and check is not None and (reason := check(other)):
            return f"{recipe['state']} and {recipe['placement']} do not go together: {reason}; take another {slot}"
    return None


__all__ = ["DEFAULTS", "ORDER", "SLOTS", "clash", "known", "parse", "system", "written"]
