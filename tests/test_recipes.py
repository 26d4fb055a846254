"""Recipes: their names and errors, what goes with what, and that everything that goes together conforms."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import recipes, registry
from harness.bench import suite
from harness.case import placements
from harness.errors import UserError
from harness.plan.copied import CopiedSystem
from harness.plan.native import NativeSystem
from harness.plan.placings import Placing
from harness.specs import Experiment
from harness.topology import Topology
from tests.baselines.recorded import make_case
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster
from tests.recipes_on_ranks import dropped

ROOT = Path(__file__).parents[1]
CONFORM = "tests.recipes_on_ranks:conform"
#: with which a state has copies, at the shapes of these tests
OPTIONS = {"t": 4, "shadows": 2}
#: exchanges that bring rows to all ranks of a node
NODE_WIDE = ("slots", "parm-s1", "parm-baseline")

# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hiermoe-hd2+fsmoe+hecate", "hiermoe-hd2+fsmoe+hecate"),
        ("hecate+fsmoe+hiermoe-hd2", "hiermoe-hd2+fsmoe+hecate"),
        ("smartmoe+hecate+hiermoe-hd2+fsmoe", "hiermoe-hd2+fsmoe+hecate+smartmoe"),
        ("contiguous+hecate+fsmoe+flat", "fsmoe+hecate"),
        ("fsmoe+flat", "flat+fsmoe"),
        ("hiermoe-hd2+serial", "hiermoe-hd2+serial"),
        ("pipelined", "flat+pipelined"),
        ("greedy+hecate+serial", "hecate+greedy"),
        # one name where a system is that recipe
        ("flat+serial", "flat"),
        ("flat+contiguous+hecate", "hecate"),
        ("pipelined+hiermoe-hd2", "hiermoe-hd2"),
        ("smartmoe+pipelined+hiermoe-hd2", "hiermoe-hd2-smart"),
        ("hiermoe+hiermoe-hd+pipelined", "hiermoe"),
        ("moetuner+flat", "moetuner"),
        ("fsmoe+shards+slots", "fsmoe"),
        ("slots+fsmoe-lina+contiguous+shards", "fsmoe-lina"),
        ("shards+slots", "slots+shards"),
        ("shards+parm-s1", "parm"),
        ("shards+fsmoe+parm-s1", "parm-s1+fsmoe+shards"),
        # a name in two slots gives the state
        ("fastermoe+hiermoe-hd2", "hiermoe-hd2+fastermoe"),
        ("fastermoe+serial", "flat+fastermoe"),
        ("fastermoe+schedule=fastermoe", "fastermoe"),
        ("schedule=fastermoe+flat", "flat+schedule=fastermoe"),
        ("state=hecate+exchange=flat+fsmoe", "fsmoe+hecate"),
    ],
)
def test_a_recipe_has_one_name_in_any_order(text, name):
    found = registry.system(text)
    assert found.name == name
    assert registry.system(name) is found


def test_every_recipe_comes_back_by_its_name():
    for names in itertools.product(*(recipes.known(slot) for slot in recipes.SLOTS)):
        recipe = dict(zip(recipes.SLOTS, names, strict=True))
        name = recipes.name_of(recipe)
        own = vars(registry.systems()[name])["recipe"] if name in registry.systems() else recipes.parse(name)
        assert recipes.DEFAULTS | dict(own) == recipe


def test_systems_that_are_recipes_have_their_parts():
    named = {
        name: own for name, system in registry.systems().items() if (own := vars(system).get("recipe")) is not None
    }
    assert set(named) >= {"flat", "hecate", "hiermoe", "hiermoe-hd2", "fastermoe", "eplb", "smartmoe", "moetuner"}
    for name, own in named.items():
        system, whole = registry.system(name), recipes.DEFAULTS | dict(own)
        made = recipes._composed("again", tuple(whole[slot] for slot in recipes.SLOTS))
        for slot in ("exchange", "schedule"):
            one, other = getattr(system, slot), getattr(made, slot)
            assert (type(one), one.name) == (type(other), other.name), name
        assert set(system.options) == set(made.options), name
        assert (dict(system.chunked), system.stages) == (dict(made.chunked), made.stages), name
        for method in ("build", "layout", "after_step", "course", "place", "planned_bytes", "copied_parameters"):
            assert getattr(system, method).__func__ is getattr(made, method).__func__, (name, method)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fsmoe+pipelined", "'pipelined': gives the schedule of the recipe, and 'fsmoe' does so too; take one"),
        ("hecate+hecate", "'hecate': gives the state of the recipe, and it is named twice"),
        ("fastermoe+hecate", "'hecate': gives the state of the recipe, and 'fastermoe' does so too; take one"),
        ("hecate+shards", "'shards': gives the state of the recipe, and 'hecate' does so too; take one"),
        ("slots+hiermoe-hd2", "'hiermoe-hd2': gives the exchange of the recipe, and 'slots' does so too; take one"),
        ("hecate+fastermoe", "take one, or give another slot (schedule=fastermoe)"),
        ("hecate+fsmo", "'fsmo': unknown; did you mean 'fsmoe'? known parts of recipes are "),
        ("hecate+", "'': unknown; known parts of recipes are "),
        ("megatron+hecate", "'megatron': is a system of its own and no part of a recipe; it gives no slot"),
        ("hiermoe-hd2-smart+hecate", "no part of a recipe; its parts are hiermoe-hd2+pipelined+smartmoe"),
        ("stat=hecate+fsmoe", "system: 'stat': unknown; did you mean 'state'? known slots are exchange, schedule, "),
        ("state=fsmoe", "system.state: 'fsmoe': unknown; "),
        ("hecat", "system: 'hecat': unknown; did you mean 'hecate'? known systems are "),
    ],
)
def test_a_wrong_name_is_told_in_one_line(text, said):
    with pytest.raises(UserError, match=re.escape(said)) as told:
        registry.system(text)
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------------------------------------------------- files


def cells(*systems: Any, **changes: Any) -> list[tuple[str, dict[str, Any]]]:
    entry = {"model": "gpt-tiny-moe", "cluster": "local-4", "workload": "balanced-512", "phase": "layer"} | changes
    found = suite.from_data({"name": "x", "experiments": [{**entry, "system": list(systems)}]}, "x.yaml")
    return [(each.system, each.options) for each in found.experiments]


def test_a_file_takes_recipes_written_out_and_short():
    written = {"exchange": "hiermoe-hd2", "schedule": "fsmoe", "state": "hecate", "placement": "smartmoe"}
    several = [
        {"state": "hecate", "schedule": "fsmoe", "exchange": "hiermoe-hd2", "options": {"t": 4}},
        {"name": "hecate+fsmoe+hiermoe-hd2", "options": {"degree_forward": 2}},
        "flat+pipelined",
        {"state": "hecate"},
        written,
        {"schedule": "serial"},
    ]
    assert cells(*several) == [
        ("hiermoe-hd2+fsmoe+hecate", {"t": 4}),
        ("hiermoe-hd2+fsmoe+hecate", {"degree_forward": 2}),
        ("flat+pipelined", {}),
        ("hecate", {}),
        ("hiermoe-hd2+fsmoe+hecate+smartmoe", {}),
        ("flat", {}),
    ]
    assert cells("fsmoe+hecate", "hecate+fsmoe", {"state": "hecate", "schedule": "fsmoe"}) == [("fsmoe+hecate", {})]


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ({"exchang": "flat"}, ".system.exchang: 'flat': unknown key; did you mean 'exchange'?"),
        ({"exchange": "hecate"}, ".system.exchange: 'hecate': unknown; "),
        ({"state": "hecat"}, ".system.state: 'hecat': unknown; did you mean 'hecate'?"),
        ({"state": ["hecate"]}, ".system.state: "),
        ({"state": "hecate", "name": "flat"}, ".system.name: 'flat': the state says it already; leave one out"),
        (
            {"state": "hecate", "options": {"degree_forward": 2}},
            "hecate has no such option: option 'degree_forward' belongs to the schedule fsmoe, which this recipe does",
        ),
        (
            {"name": "hecate+smartmoe", "options": {"reshard_every": 3}},
            "option 'reshard_every' of the state hecate is not for this recipe, whose placement moves experts",
        ),
        ({"name": "hecate+fsmoe", "options": {"degree_forwards": 2}}, "no such option; did you mean 'degree_forward'?"),
    ],
)
def test_what_a_file_has_wrong_is_told_in_one_line(system, said):
    with pytest.raises(UserError, match=re.escape(said)) as told:
        cells(system)
    assert str(told.value).startswith("x.yaml: experiments[0]")
    assert "\n" not in str(told.value)


def test_slots_are_listed(moebench):
    status, out, _ = moebench("list", "slots", "--json")
    rows = json.loads(out)
    assert status == 0
    assert all(row["what"] and row["source"] for row in rows)
    found = {(row["slot"], row["name"]): row for row in rows}
    assert {slot for slot, _ in found} == set(recipes.SLOTS)
    assert found["state", "fastermoe"]["short"] == "fastermoe"
    assert found["schedule", "fastermoe"]["short"] == "schedule=fastermoe"
    assert "dimension" in found["exchange", "hiermoe-hd"]["options"]
    assert "dimension" not in found["exchange", "hiermoe-hd2"]["options"]
    assert {name for slot, name in found if slot == "placement"} >= {"contiguous", "smartmoe", "hiermoe", "two-stage"}
    status, out, _ = moebench("list", "slots", "schedule")
    assert status == 0
    assert "hecate" not in out.replace("hecate-", "")
    status, _, error = moebench("list", "slots", "schedul")
    assert status == 2
    assert "did you mean 'schedule'?" in error


# ------------------------------------------------------------------------------------------------ what goes together


def refused(exchange: str, schedule: str, state: str, placement: str) -> bool:
    """The list of what makes no sense."""
    copies = state != "owned"
    return (
        ((exchange in NODE_WIDE) != (state == "shards"))  # who sees the rows of a node
        or (state == "shards" and placement != "contiguous")  # they do not move
        or (schedule == "fastermoe" and state != "fastermoe")  # what stays with a shadow is computed last
        or (state in ("flexmoe", "eplb", "per-node") and placement != "contiguous")  # both move the same experts
        or (placement == "hiermoe" and (not exchange.startswith("hiermoe") or copies))  # the swap's objective
        or (exchange == "parm-baseline" and schedule != "serial")  # it has nothing side by side
    )


def test_pairs_that_make_no_sense_are_refused_with_the_reason():
    case, told = make_case(Topology((2, 2))), set()
    for names in itertools.product(*(recipes.known(slot) for slot in recipes.SLOTS)):
        recipe = dict(zip(recipes.SLOTS, names, strict=True))
        reason = recipes.clash(recipe)
        assert (reason is not None) == refused(*names), recipe
        if reason is not None and reason not in told:
            told.add(reason)
            assert recipes.made(recipe).refuse(case) == reason
            assert "\n" not in reason
    reaches = (
        "the exchange hiermoe-hd2 brings a row to one rank that holds its expert, the state shards needs it on all "
    )
    assert f"{reaches}ranks of the expert's node" in told
    assert any(
        reason.startswith("the exchange slots brings a row to all ranks of the expert's node") for reason in told
    )
    assert any("cut over their node and do not move" in reason for reason in told)
    grouped = registry.system("fastermoe+schedule=fastermoe+hiermoe-hd2")
    assert "which the exchange hiermoe-hd2 cannot" in str(grouped.refuse(case))


def sensible() -> list[str]:
    """All exchanges with all schedules and states."""
    found = []
    for names in itertools.product(*(recipes.known(slot) for slot in ("exchange", "schedule", "state"))):
        exchange, schedule, state = names
        unfit = exchange != "flat" and schedule in ("fastermoe", "eps-moe")  # parts of them go apart
        unfit |= exchange == "ppmoe" and state != "per-node"  # it stays in its node
        if not refused(*names, "contiguous") and not unfit:
            found.append(recipes.name_of(dict(zip(("exchange", "schedule", "state"), names, strict=True))))
    return found


def options_of(name: str, **more: Any) -> dict[str, Any]:
    system = registry.system(name)
    return {key: value for key, value in {**system.chunked, **OPTIONS, **more}.items() if key in system.options}


@pytest.mark.parametrize("shape", [(2, 2), pytest.param((2, 4), marks=pytest.mark.long)], ids=str)
def test_everything_that_goes_together_conforms(session, shape):
    names = sensible()
    assert len(names) > 150
    both, rivals = ("float64", "float32"), ("float64",)  # of FSMoE's schedule, which differ in lanes and degrees
    trials = [(name, rivals if "fsmoe-" in name else both, options_of(name)) for name in names]
    rows = session(cluster(shape)).call(CONFORM, {"trials": trials, "trial": "ragged"}, timeout_s=600)[0]
    assert len(rows) == sum(len(dtypes) for _, dtypes, _ in trials)
    allowed = {"float64": 1e-10, "float32": 1e-5}
    wrong = [row for row in rows if row["status"] != "ok" or max(row["errors"].values()) > allowed[row["dtype"]]]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("shape", [(2, 2), pytest.param((2, 4), marks=pytest.mark.long)], ids=str)
def test_ten_steps_have_the_oracles_losses(session, shape):
    trainings = {
        "hiermoe-hd2+fsmoe+hecate": {"window": 2, "reshard_every": 3},
        "hiermoe-hd+fsmoe+hecate-rm+smartmoe": {"place_every": 3},
        "hiermoe-hd2+pipelined+eplb": {"rearrange_every": 3},
        "hiermoe-hd2+fsmoe-lina+fastermoe": {},
        "hiermoe-hd+fsmoe+hiermoe": {"swap_every": 2},
    }
    trials = [(name, ("float64",), options_of(name, **more)) for name, more in trainings.items()]
    rows = session(cluster(shape)).call(CONFORM, {"trials": trials, "num_steps": 10}, timeout_s=300)[0]
    for row in rows:
        assert row["status"] == "ok", row
        assert row["errors"]["loss"] < 1e-9, row


#: often enough for experts to move within ten steps
OFTEN = {"place_every": 3, "swap_every": 2, "rearrange_every": 3, "reshard_every": 3, "window": 2}


@pytest.mark.long
@pytest.mark.minutes
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("exchange", sorted(recipes.known("exchange")))
def test_everything_that_goes_together_trains_as_the_oracle(session, exchange, record_property):
    """Ten steps on 8 ranks of all that goes with ``exchange``, each with the next of the placements that go with it."""
    moving = [
        name for name, part in recipes.known("placement").items() if name == "contiguous" or hasattr(part, "mover")
    ]
    names = []
    for i, name in enumerate(sensible()):
        recipe = recipes.DEFAULTS | dict(registry.system(name).recipe)
        fit = [each for each in moving if not refused(*list(recipe.values())[:3], each)]
        if recipe["exchange"] == exchange:
            names.append(recipes.name_of(recipe | {"placement": fit[i % len(fit)]}))
    rows = []
    for start in range(0, len(names), 10):
        trials = [(name, ("float64",), options_of(name, **OFTEN)) for name in names[start : start + 10]]
        rows += session(cluster((2, 4))).call(CONFORM, {"trials": trials, "num_steps": 10}, timeout_s=3600)[0]
    record_property("trained", len(rows))
    print(f"{exchange}: {len(rows)} recipes trained")
    wrong = [row for row in rows if row["status"] != "ok" or not row["errors"]["loss"] < 1e-9]
    assert not wrong, wrong[:5]
    assert len(rows) == len(names) > 0


def test_a_placement_takes_over_from_a_state_that_moves_experts():
    alone, placed = registry.system("hecate"), registry.system("hecate+smartmoe")
    assert "reshard_every" in alone.options
    assert "reshard_every" not in placed.options
    assert issubclass(placed, Placing)
    assert placed.variants["materialised and re-sharded"] == {"t": 4, "window": 2, "place_every": 3}
    assert registry.system("eplb+fsmoe").variants == CopiedSystem.variants


def test_a_composition_goes_on_from_its_checkpoint(session, tmp_path):
    """The state's loads, the placement's, and where experts are."""
    name, options = "hiermoe-hd2+fsmoe+hecate+smartmoe", {"t": 3, "window": 2, "place_every": 5}
    payload = training(name, cluster((2, 2)), options=options) | {"every": 3, "dies_at": 0}

    def run(folder: str, num_steps: int) -> dict[str, Any]:
        more = {"folder": str(tmp_path / folder), "num_steps": num_steps}
        return session(cluster((2, 2))).call("tests.bench.checkpoint_on_ranks:trained", payload | more, timeout_s=100)[
            0
        ]

    whole, _, rest = run("whole", 12), run("cut", 9), run("cut", 12)
    assert rest["began"] == 9
    assert rest["losses"] == {step: whole["losses"][step] for step in range(9, 12)}
    assert rest["owners"] == whole["owners"]
    assert rest["owners"][0] != [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["hiermoe-hd2+fsmoe+hecate+greedy", "hiermoe-hd+pipelined+random"])
def test_planners_place_what_is_served_over_any_exchange(session, name):
    zipf = {"name": "w", "tokens_per_rank": 16, "generator": "zipf", "params": {"target": 2.0}}
    served = {"phase": "prefill", "backward": False, "workload": zipf}
    payload = training(name, cluster((2, 2)), **served) | {"broken": False}
    found = session(cluster((2, 2))).call("tests.methods.moetuner_on_ranks:gate", payload, timeout_s=100)[0]
    assert found["status"] == "ok", found
    assert found["errors"]["logits"] < 1e-10
    experiment = Experiment.model_validate(payload["experiment"])
    placed, index = placements(experiment), placements(experiment.model_copy(update={"system": "flat"}))
    assert any((a.hosts != b.hosts).any() for a, b in zip(placed, index, strict=True))


# ------------------------------------------------------------------------------------------------ one idea, one file


def examples() -> dict[str, str]:
    """Files in CONTRIBUTING.md, by the recipe that each says."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    return {re.search(r"check `(\S+)`", text)[1]: text for text in blocks}  # type: ignore[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, text in enumerate(examples().values()):
        (tmp_path / f"example{number}.py").write_text(text)
    return tmp_path


def test_one_file_adds_a_part_for_one_slot_in_few_lines(folder, session):
    texts = examples()
    brought = [re.search(r"^([A-Z]+) = \{", text, re.MULTILINE)[1] for text in texts.values()]  # type: ignore[index]
    assert brought == list(recipes.SLOTS.values())
    assert all(len(text.splitlines()) <= 40 for text in texts.values())
    with dropped(str(folder)):
        assert not registry.faults()
        trials = [(name, ("float64", "float32"), options_of(name)) for name in texts]
        (placed,) = (name for name in texts if name.startswith("trades"))
        variant = registry.system(placed).variants["materialised and re-sharded"]
    ranks, here = session(cluster((2, 2))), {"folder": str(folder)}
    rows = ranks.call(CONFORM, {**here, "trials": trials, "trial": "ragged"}, timeout_s=100)[0]
    rows += ranks.call(CONFORM, {**here, "trials": [(placed, (), variant)], "num_steps": 8}, timeout_s=100)[0]
    assert len(rows) == 2 * len(texts) + 1
    assert {row["status"] for row in rows} == {"ok"}, rows
    for name in ("padded", "halves", "hottest", "trades"):
        with pytest.raises(UserError):
            registry.system(f"{name}+hecate")  # gone again


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("EXCHANGES = {'bad': 3}\n", "EXCHANGES['bad'] is no ExchangeSlot"),
        ("STATES = {'bad': int}\n", "STATES['bad'] is no NativeSystem"),
        ("SCHEDULES = ['bad']\n", "SCHEDULES: "),
        (
            "from harness.plan.slots import FlatSlot\nclass Bad(FlatSlot):\n    title = None\n"
            "EXCHANGES = {'bad': Bad()}\n",
            "EXCHANGES['bad'] has no title",
        ),
        ("from baselines.flat import Flat\nSTATES = {'b d': Flat}\n", "STATES['b d'] has no name of letters"),
    ],
)
def test_a_file_that_brings_no_part_is_left_out_and_named(tmp_path, monkeypatch, text, said):
    (tmp_path / "bringsbad.py").write_text(text)
    monkeypatch.setattr(registry, "_faults", {})
    with dropped(str(tmp_path)):
        for slot in recipes.SLOTS:
            assert not {"bad", "b d"} & set(recipes.known(slot))
        (fault,) = registry.faults()
    assert "bringsbad.py: " in fault
    assert said in fault


def test_parts_say_what_they_are():
    parts: Mapping[str, Any] = {
        f"{slot} {name}": part for slot in recipes.SLOTS for name, part in recipes.known(slot).items()
    }
    assert all(isinstance(part.title, str) and part.source for part in parts.values())
    assert all(issubclass(part, NativeSystem) for part in recipes.known("state").values())
