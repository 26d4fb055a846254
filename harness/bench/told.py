"""What can be told of a cell of an experiments file without a rank (``harness.bench.suite``)."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable

from harness.bench import serve
from harness.case import placements
from harness.errors import UserError, bad
from harness.presets import this_machine
from harness.routing import KNOWN_GENERATORS, make_routing
from harness.routing.make import file_of
from harness.specs import SERVING, Experiment, Model, Ragged, Workload
from harness.topology import Topology, check_size

MOST_LAYERS, MOST_LOADS, MOST_CHOICES = 4096, 1 << 26, 1 << 28  # of a step; of a layer


def check_case(experiment: Experiment, here: str, physical: bool) -> None:
    """What can be told without a rank: the routing exists, and the experts divide."""
    workload, topology = experiment.workload, Topology(experiment.cluster.shape)
    with at(here):
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
                "workload.generator", workload.generator, "unknown" + nearest(workload.generator, KNOWN_GENERATORS)
            )
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


def check_layout(experiment: Experiment, here: str) -> None:
    """Layers and experts divide as the layout has it."""
    model, groups = experiment.model, experiment.groups
    holders = Topology(experiment.cluster.shape) if groups is None else groups.topology
    with at(here):
        if (stages := experiment.layout.pipeline_parallel) > model.num_layers:
            remedy = f"are more stages than the model has layers; give at most {model.num_layers}"
            raise bad("layout.pipeline_parallel", stages, remedy)
        for level, link in enumerate(experiment.cluster.levels):
            if model.num_experts % (num_groups := holders.num_units(level)):
                found = (
                    f"is not divisible by the {num_groups} groups of link level {link.name!r}; change one of the two"
                )
                raise bad("model.num_experts", model.num_experts, found)


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


class at:
    """Put the file and the field before the message of a ``UserError`` from elsewhere that does not name them."""

    def __init__(self, here: str):
        self.here = here

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            text = str(error)
            raise type(error)(text if text.startswith(self.here) else f"{self.here}: {text}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...' with the known words."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" known: {', '.join(known) or 'none'}"
