"""What one MoE layer costs under FSMoE (arXiv 2501.10714): linear models of every operation, and where they come from.

Section 4.1: a chunk of ``n / r`` of an operation's work takes ``alpha + n / r * beta`` seconds, for the all-to-all, the
all-gather and reduce-scatter of expert sharding, and the experts. All fields are arrays that broadcast, so one object
holds a whole grid of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from harness.errors import bad
from harness.plan.cost import Even
from harness.plan.device import CURVE
from harness.plan.machine import Machine
from harness.specs import Cluster, Collective, Gemm

if TYPE_CHECKING:
    from methods.fsmoe.sizes import Sizes

START_S, LAUNCH_S = 2e-5, 5e-6
Array = np.ndarray[Any, np.dtype[Any]]


def _floats(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Linear:
    """Time of an operation: start-up ``alpha_s`` [...], ``beta_s`` [...] seconds a unit, ``n`` [...] units in all.

    ``UserError`` if a value is negative or not finite.
    """

    alpha_s: Array
    beta_s: Array
    n: Array

    def __post_init__(self) -> None:
        values = [_floats(getattr(self, field.name)) for field in fields(self)]
        for field, value, whole in zip(fields(self), values, np.broadcast_arrays(*values), strict=True):
            if not (np.isfinite(value) & (value >= 0)).all():
                raise bad(f"cost.{field.name}", value.tolist(), "must be finite and not negative")
            object.__setattr__(self, field.name, whole)

    def chunk_s(self, degree: ArrayLike) -> Array:
        """Seconds of one of ``degree`` [...] equal chunks."""
        return self.alpha_s + self.n / np.asarray(degree) * self.beta_s


NOTHING = Linear(np.zeros(()), np.zeros(()), np.zeros(()))


@dataclass(frozen=True, eq=False)
class Reduce:
    """The gradient all-reduce between nodes, linear in its bytes. Of no gradient it costs nothing."""

    alpha_s: float
    beta_s_per_byte: float

    def time_s(self, num_bytes: ArrayLike) -> Array:
        """t_ar(n), with t_ar(0) = 0: what is not sent is not started."""
        num_bytes = _floats(num_bytes)
        return np.where(num_bytes > 0, self.alpha_s + num_bytes * self.beta_s_per_byte, 0.0)

    def bytes_in(self, time_s: ArrayLike) -> Array:
        """g_inv(t): bytes that are reduced within ``time_s``; none where that is not longer than the start-up."""
        left = np.maximum(_floats(time_s) - self.alpha_s, 0.0)
        if self.beta_s_per_byte == 0:
            return np.where(left > 0, np.inf, 0.0)
        return left / self.beta_s_per_byte


@dataclass(frozen=True, eq=False)
class LayerCosts:
    """One direction of one MoE layer, or of [N] of them: a single all-to-all, all-gather, reduce-scatter, experts."""

    a2a: Linear
    ag: Linear
    rs: Linear
    experts: Linear

    @property
    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(part.n.shape for part in (self.a2a, self.ag, self.rs, self.experts)))

    def __getitem__(self, index: Any) -> LayerCosts:
        """The layers at ``index`` of the grid [N], in numpy's ways of indexing."""

        def pick(part: Linear) -> Linear:
            whole = (np.broadcast_to(value, self.shape) for value in (part.alpha_s, part.beta_s, part.n))
            return Linear(*(value[index] for value in whole))

        return LayerCosts(pick(self.a2a), pick(self.ag), pick(self.rs), pick(self.experts))

    def backward(self) -> LayerCosts:
        """The backward direction of this forward one: the same messages, the experts twice as long.

        Interpretation: the text doubles alpha, beta and n of the experts, which would be four times the work; the
        authors' code doubles alpha and beta, which is the two products (of input and of weight gradient) per forward
        one, and is done here.
        """
        experts = self.experts
        return replace(self, experts=Linear(2 * experts.alpha_s, 2 * experts.beta_s, experts.n))

    def folded(self) -> LayerCosts:
        """All communication on one stream (Tutel with PipeMoE, FSMoE-No-IIO): all-gather and reduce-scatter become
        part of the all-to-alls around the experts, so that 2 t_a2a' = 2 t_a2a + t_ag + t_rs for any degree.

        Interpretation: the authors add (alpha_ag + alpha_rs) / 2 to alpha and 2 (beta_ag + beta_rs) to beta. That
        beta is this fold for N_ESP = 4 only, as n_ag = N_ESP n_a2a; with N_ESP = 8 it leaves out half of it.
        """
        alpha_s = self.a2a.alpha_s + (self.ag.alpha_s + self.rs.alpha_s) / 2
        volume_s = self.a2a.n * self.a2a.beta_s + (self.ag.n * self.ag.beta_s + self.rs.n * self.rs.beta_s) / 2
        return LayerCosts(a2a=Linear(alpha_s, np.ones(()), volume_s), ag=NOTHING, rs=NOTHING, experts=self.experts)


def layer_costs(sizes: Sizes, cluster: Cluster, num_ranks: int | None = None) -> LayerCosts:
    """Of what a direction of a layer, or of [N] layers, moves and computes, at the cluster's constants. Every GEMM of a
    chunk is a launch with its own start-up.

    ``num_ranks`` picks constants that the cluster lists for that number of ranks (``a2a.inter@16``), where it does.
    ``UserError`` if the cluster lacks one."""

    def linear(key: str, amount: Any, launches: Any = 1) -> Linear:
        alpha, beta = cluster.linear(key, num_ranks)
        return Linear(_floats(launches) * alpha, _floats(beta), _floats(amount))

    if sizes.wait_s is not None:
        experts = Linear(_floats(sizes.wait_s[0]), np.ones(()), _floats(sizes.wait_s[1]))
    else:
        experts = linear("gemm", sizes.macs, sizes.gemms) if np.any(sizes.gemms) else NOTHING
    a2a = linear(f"a2a.{sizes.scope}", sizes.slot_bytes)
    if sizes.num_local == 1:
        return LayerCosts(a2a, NOTHING, NOTHING, experts)
    gathered_bytes = sizes.slot_bytes * sizes.num_local
    return LayerCosts(a2a, linear("ag.intra", gathered_bytes), linear("rs.intra", gathered_bytes), experts)


def stated_costs(cluster: Cluster, keys: Sequence[str]) -> Cluster | None:
    """``cluster`` with costs under ``keys``: its own, or those of a real cluster's data sheet; None where it states
    neither.

    Interpretation: the planners need a start-up time, of which data sheets say nothing. ``START_S`` and ``LAUNCH_S``
    are orders of magnitude of NCCL's collectives and of kernels."""
    if all(key in cluster.collectives or (key == "gemm" and cluster.gemm is not None) for key in keys):
        return cluster
    rates = [level.bandwidth_bytes_per_s for level in cluster.levels if level.size > 1]
    if cluster.kind != "physical" or None in rates or cluster.device_flops_per_s is None:
        return None
    sheet, found = Machine.data_sheet(cluster), dict(cluster.collectives)
    for operation, scope in (key.split(".") for key in keys if key != "gemm"):
        beta = float(sheet.seconds(Even(operation, scope, 1.0)))  # type: ignore[arg-type]
        found.setdefault(f"{operation}.{scope}", Collective(alpha_s=START_S, beta_s_per_byte=beta))
    gemm = cluster.gemm or Gemm(alpha_s=LAUNCH_S, beta_s_per_mac=2 / (CURVE.share * cluster.device_flops_per_s))
    return cluster.model_copy(update={"collectives": found, "gemm": gemm})


def reduce_costs(cluster: Cluster, num_ranks: int | None = None, *, scope: str = "inter") -> Reduce:
    """The cluster's gradient all-reduce between nodes, or of another ``scope``; ``num_ranks`` as in ``layer_costs``."""
    return Reduce(*cluster.linear(f"ar.{scope}", num_ranks))


def attention_gradient_elements(
    hidden: ArrayLike, num_mp: int, *, biased: ArrayLike = True, kv_fraction: ArrayLike = 1.0
) -> Array:
    """Gradient elements that one rank reduces between nodes per layer: its share of the attention's weights.

    The experts have no replica (one per node, sharded inside it). As in the authors' driver: queries, keys and values
    and their biases are split over ``num_mp`` ranks, the output projection too, but not its bias. ``kv_fraction`` is
    key-value heads per head (Mixtral: 1/4, and not ``biased``). Whole elements, rounded down.
    """
    hidden = _floats(hidden)
    qkv = 1 + 2 * _floats(kv_fraction)
    weights = (qkv * hidden**2 + hidden**2) / num_mp
    return np.floor(weights + np.where(biased, qkv * hidden / num_mp + hidden, 0.0)).astype(np.int64)
