"""The routing of one layer at one step, the same on whatever machine it is made: whole, as loads alone, or a sample."""

from __future__ import annotations

import functools
import zlib

import numpy as np

from harness.errors import bad
from harness.routing import generators
from harness.routing.certificate import expert_counts
from harness.routing.deal import in_whole_numbers
from harness.routing.generators import GENERATORS
from harness.routing.groups import bends, within_groups
from harness.routing.types import Routing
from harness.specs import Model, Workload
from harness.topology import Topology

#: every value of ``Workload.generator``
KNOWN_GENERATORS = (*GENERATORS, "trace", "natural")
SAMPLE_TOKENS = 128  # of a rank


def make_routing(
    workload: Workload, model: Model, topology: Topology, *, step: int = 0, layer: int = 0
) -> Routing | None:
    """The routing of one layer at one step.

    None for the generator ``natural``: the router's own choice, which only a model that runs can make (phase
    ``train_step``). For ``trace``: layer ``params.layer + layer`` at recorded step ``params.step`` (by default the
    last), whatever ``step`` is unless the trace is replayed, and the first tokens of each rank
    (``harness.routing.replay``). A model whose gate minds expert groups (DeepSeek-V3's limit, MoGE) gets the nearest
    routing that it can choose.

    Errors (``UserError``): a gate that takes no prescribed routing (``Model.takes_routing``), unknown generator,
    unknown or impossible params, a trace that does not fit.
    """
    _check(workload, model)
    if workload.generator == "natural":
        return None
    return _routing(workload, model, topology, step, layer)


def planned_routing(workload: Workload, model: Model, topology: Topology, *, step: int = 0, layer: int = 0) -> Routing:
    """What a case is planned with: ``make_routing``'s, or a uniform one in the place of a natural one."""
    _check(workload, model)
    return _routing(workload, model, topology, step, layer)


def counts_of(
    workload: Workload,
    model: Model,
    topology: Topology,
    *,
    step: int = 0,
    layer: int = 0,
    most_tokens: int | None = None,
) -> np.ndarray:
    """``expert_counts`` of ``planned_routing``: assignments from each rank to each expert, int64 [W, E].

    No token is drawn where the generator states loads, and each is drawn without its experts' order where it is
    uniform. Else (``markov``; a gate that minds expert groups, unless the workload is its ``grouped``) the ids are
    drawn and counted. ``most_tokens``: of a rank, that are drawn then at most, except of a trace; the counts are
    estimated from them (``_estimated``).
    """
    _check(workload, model)
    if workload.generator not in ("trace", "markov") and not bends(workload, model):
        return _loads(workload, model, topology, step, layer)
    if workload.generator == "trace" and not bends(workload, model):
        from harness.routing.replay import counts_from_trace  # pyarrow only where a trace is read

        if (told := counts_from_trace(workload, model, topology, layer, step)) is not None:
            return told
    if most_tokens is None or workload.generator == "trace":
        return expert_counts(_routing(workload, model, topology, step, layer))
    return _estimated(workload, model, topology, step, layer, most_tokens)


@functools.lru_cache(maxsize=128)  # the systems of a race ask for the same ones
def sampled_routing(
    workload: Workload,
    model: Model,
    topology: Topology,
    *,
    step: int = 0,
    layer: int = 0,
    most_tokens: int = SAMPLE_TOKENS,
) -> Routing:
    """A routing of at most ``most_tokens`` tokens of each rank, for statistics of pairs: who shares tokens with whom,
    and which expert of the next layer follows. ``planned_routing`` itself where no rank has more.

    Where the generator states loads, each rank's load of each expert is the whole routing's times the share of its
    tokens, rounded up or down, and the tokens are dealt anew: like the whole routing's they are random but for the
    loads. Where every token is drawn (uniform, markov) fewer are drawn, by the same rule, and a trace's are chosen at
    random: then loads are in proportion but for chance. In every layer of a step they are the same tokens. A gate that
    minds expert groups acts on the sample as on the whole.
    """
    _check(workload, model)
    tokens = workload.tokens(topology.num_ranks)
    fewer = tuple(min(count, most_tokens) for count in tokens)
    return _routing(workload, model, topology, step, layer, None if fewer == tokens else fewer)


# ------------------------------------------------------------------------------------------------------ in any size


def _routing(
    workload: Workload, model: Model, topology: Topology, step: int, layer: int, sample: tuple[int, ...] | None = None
) -> Routing:
    """``sample``: tokens of each rank, where they are not to be all of them."""
    plain = _stand_in(workload)
    tokens = workload.tokens(topology.num_ranks) if sample is None else sample
    if plain.generator == "trace":
        from harness.routing.replay import from_trace  # pyarrow only where a trace is read

        ids = from_trace(plain, model, topology, layer, step)
        if sample is not None:
            ids = ids[_chosen(workload.tokens(topology.num_ranks), sample, workload.seed)]
    elif sample is not None:
        ids = generators.sample(plain, model, topology, step, layer, sample)
    else:
        ids = generators.generate(plain, model, topology, step, layer)
    natural = workload.generator == "natural"
    seed = workload.seed if natural else [zlib.crc32(b"groups"), workload.seed, step, layer]
    return Routing(within_groups(ids, model, np.random.default_rng(seed)), tokens, model.num_experts)


def _loads(workload: Workload, model: Model, topology: Topology, step: int, layer: int) -> np.ndarray:
    """int64 [W, E], before a gate limits expert groups."""
    found = generators.loads(_stand_in(workload), model, topology, step, layer)
    assert found is not None
    return found


def _estimated(
    workload: Workload, model: Model, topology: Topology, step: int, layer: int, most_tokens: int
) -> np.ndarray:
    """int64 [W, E] from a sample of all ranks together, as a rank's own tokens in it are too few to tell. Stated loads
    change by as much as the limit on groups changes them in the sample; drawn ones are the same on all ranks."""
    sample = sampled_routing(workload, model, topology, step=step, layer=layer, most_tokens=most_tokens)
    tokens, drawn = np.array(workload.tokens(topology.num_ranks)), np.array(sample.tokens)
    found = np.bincount(sample.ids.ravel(), minlength=model.num_experts)  # [E]
    wanted = tokens[:, None] * found / max(1, drawn.sum())
    if workload.generator in generators.STATED:
        stated = _loads(workload, model, topology, step, layer)
        before = (stated * (drawn / np.maximum(tokens, 1))[:, None]).sum(0)  # in the sample
        wanted = np.where(before > 0, stated * found / np.where(before > 0, before, 1.0), wanted)
    num_groups = model.num_groups if model.gate == "moge" else 1  # each with its share of every token
    parts = np.split(wanted, num_groups, axis=1)
    return np.concatenate([in_whole_numbers(part, tokens, model.top_k // num_groups) for part in parts], axis=1)


def file_of(workload: Workload) -> str | None:
    """The file that its routing comes from: a trace, the one that a walk is fitted to, or a trained model's weights."""
    name = {"trace": "path", "walk": "like", "natural": "weights"}.get(workload.generator)
    found = workload.params.get(name) if name is not None else None
    return None if found is None else str(found)


def _stand_in(workload: Workload) -> Workload:
    """A uniform workload for a natural one."""
    if workload.generator != "natural":
        return workload
    return workload.model_copy(update={"generator": "uniform", "params": {}})


def _chosen(tokens: tuple[int, ...], fewer: tuple[int, ...], seed: int) -> np.ndarray:
    """Which of all ranks' ``tokens`` are the ``fewer``, ascending."""
    rng, starts = np.random.default_rng([zlib.crc32(b"sample"), seed]), np.cumsum(tokens) - tokens
    parts = [np.sort(rng.permutation(num)[:few]) for num, few in zip(tokens, fewer, strict=True)]
    return np.concatenate([start + part for start, part in zip(starts, parts, strict=True)])


def _check(workload: Workload, model: Model) -> None:
    if workload.generator == "natural":
        if other := set(workload.params) - {"weights"}:
            remedy = "natural routing has no params but weights, the file of a trained model to serve"
            raise bad(f"workload {workload.name} (natural).params", sorted(other)[0], remedy)
        return
    if not model.takes_routing:
        field, remedy = "gate", "takes no prescribed routing; use a natural workload"
        if model.gate == "xmoe":
            field, remedy = "gate_dim", f"must be at least num_experts = {model.num_experts} to prescribe a routing"
        elif model.gate_noise:
            field = "gate_noise"
        raise bad(f"model {model.name}.{field}", getattr(model, field), remedy)
    if workload.generator not in KNOWN_GENERATORS:
        known = ", ".join(KNOWN_GENERATORS)
        raise bad(f"workload {workload.name}.generator", workload.generator, f"unknown; known generators are {known}")
