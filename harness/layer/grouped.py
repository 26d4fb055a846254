"""One MoE layer's truth at full shape: exact, and cheap enough to stand beside every timed call.

The dense oracle computes every expert on every token. Here each expert sees only the rows that chose it, and what is
wanted of a tensor is how it looks through a *lens*: a few random directions. Seen so, a row of the output is
h (w2 v), a row of the input's gradient dh' (w1^T v), and a gradient of a weight a sum of products of two numbers a row.
So of the six matrix products of a training step two are left (of the nine of swiglu, three), in float32 or float64,
and no row, column, expert or weight is left out: a random direction sees them all.

Rows go to the experts and numbers come back through ``torch.distributed`` alone; nothing here is shared with a system.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from harness.comm.job import Job
from harness.layer.weights import shared_names
from harness.specs import Model

NUM_DIRECTIONS = 4  # of two, both may be nearly at right angles to what is wrong
CHUNK_BYTES = 1 << 26  # of rows that one rank has under way
Matrices = Mapping[str, torch.Tensor]  # w1, w2 and perhaps w3 of one expert


@dataclasses.dataclass(frozen=True, eq=False)
class Lens:
    """Random directions, standard normal: of outputs ``y`` [M, q] and input gradients ``dx`` [M, q]; of the gradient of
    a matrix [K, N] a pair [K, q], [N, q], by name."""

    y: torch.Tensor
    dx: torch.Tensor
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def draw(cls, model: Model, gate: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> Lens:
        """``gate``: its parameters (``Weights.gate``)."""
        generator = torch.Generator().manual_seed(20_011)

        def directions(rows: int) -> torch.Tensor:
            return torch.randn(rows, NUM_DIRECTIONS, generator=generator, dtype=torch.float64).to(device, dtype)

        shapes = {"w1": (model.hidden, model.ffn), "w2": (model.ffn, model.hidden), "w3": (model.hidden, model.ffn)}
        shapes |= {name: (value.shape[0], value[0].numel()) for name, value in gate.items()}
        size = model.shared_size
        of_shared = {"w1": (model.hidden, size), "w2": (size, model.hidden), "w3": (model.hidden, size)}
        shapes |= {name: of_shared[of] for name, of in shared_names(model).items()}
        y, dx = directions(model.hidden), directions(model.hidden)
        return cls(y, dx, {name: (directions(rows), directions(columns)) for name, (rows, columns) in shapes.items()})

    def of_matrix(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """u^T gradient v for each pair of directions, [q]; gradient [K, N], or [K, ...] whose rest counts as N."""
        u, v = self.pairs[name]
        return ((gradient.flatten(1).to(v.dtype) @ v) * u).sum(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """What is known of each (token, expert) pair, without the gate's weight: [n, ...] each, in the work's format."""

    token: torch.Tensor  # int64 [n]
    expert: torch.Tensor  # int64 [n]
    y: torch.Tensor  # [n, q]: the expert's output
    gate: torch.Tensor | None = None  # [n]: gradient of the pair's gate weight
    dx: torch.Tensor | None = None  # [n, q]: of the token's gradient, the part through the expert
    weights: dict[str, torch.Tensor] = dataclasses.field(
        default_factory=dict
    )  # [n, q]: its part of each matrix's gradient
    sizes: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # [n]: squared norms of these parts
    shared: Pairs | None = None  # of each token with all shared experts side by side, [T, ...] each


def identities(
    token: torch.Tensor, expert: torch.Tensor, x: torch.Tensor, dy: torch.Tensor | None, lens: Lens
) -> Pairs:
    """Of experts that return their input. x, dy [T, M]."""
    x = x.to(lens.y.dtype)
    y = (x @ lens.y)[token]
    if dy is None:
        return Pairs(token, expert, y)
    dy = dy.to(lens.y.dtype)
    return Pairs(token, expert, y, (x * dy).sum(1)[token], (dy @ lens.dx)[token])


def look_shared(model: Model, x: torch.Tensor, dy: torch.Tensor | None, matrices: Matrices, lens: Lens) -> Pairs | None:
    """x, dy [T, M] through all shared experts, which every rank has; weights by the names of ``shared_names``. None
    where there are none."""
    if not (names := shared_names(model)):
        return None
    given = {name: matrices[of].to(x.device, lens.y.dtype) for name, of in names.items()}
    token = torch.arange(len(x), device=x.device)
    return _apart(names, token, torch.full_like(token, model.num_experts), _of_expert(given, x, dy, lens), dy is None)


def look(
    job: Job,
    model: Model,
    token: torch.Tensor,
    expert: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor | None,
    owner: np.ndarray,
    matrices: Callable[[int], Matrices],
    lens: Lens,
) -> Pairs:
    """Collective: x, dy [T, M] of this rank's tokens through the experts of its pairs. ``owner`` [E]: the rank that
    knows each expert's ``matrices``."""
    names = ("w1", "w2", "w3") if model.ffn_type == "swiglu" else ("w1", "w2")
    key = torch.as_tensor(owner, device=x.device)[expert] * model.num_experts + expert
    order = key.argsort(stable=True)
    width = x.shape[1] * x.element_size() * (1 if dy is None else 2)
    num_chunks = _largest(job, math.ceil(len(order) * width / CHUNK_BYTES))
    found = [_there_and_back(job, names, part, token, expert, x, dy, owner, matrices, lens)
             for part in order.tensor_split(max(1, num_chunks))]  # fmt: skip
    columns = torch.empty(len(order), found[0].shape[1], dtype=lens.y.dtype, device=x.device)
    columns[order] = torch.cat(found)
    return _apart(names, token, expert, columns, dy is None)


def _apart(
    names: Iterable[str], token: torch.Tensor, expert: torch.Tensor, columns: torch.Tensor, forward: bool
) -> Pairs:
    q = NUM_DIRECTIONS
    if forward:
        return Pairs(token, expert, columns)
    weights, sizes = {}, {}
    for i, name in enumerate(names):
        start = 2 * q + 1 + i * (q + 1)
        weights[name], sizes[name] = columns[:, start : start + q], columns[:, start + q]
    return Pairs(token, expert, columns[:, :q], columns[:, q], columns[:, q + 1 : 2 * q + 1], weights, sizes)


def _there_and_back(
    job: Job,
    names: tuple[str, ...],
    part: torch.Tensor,
    token: torch.Tensor,
    expert: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor | None,
    owner: np.ndarray,
    matrices: Callable[[int], Matrices],
    lens: Lens,
) -> torch.Tensor:
    """Pairs ``part``, sorted by owner, to their experts and what these find, [n, columns], back."""
    sent = torch.bincount(torch.as_tensor(owner, device=x.device)[expert[part]], minlength=job.num_ranks)
    received = torch.empty_like(sent)
    if job.num_ranks > 1:
        dist.all_to_all_single(received, sent)
    else:
        received = sent
    out, into = sent.tolist(), received.tolist()

    def travel(rows: torch.Tensor, there: bool = True) -> torch.Tensor:
        if job.num_ranks == 1:
            return rows
        give, take = (out, into) if there else (into, out)
        arrived = rows.new_empty(sum(take), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), take, give)
        return arrived

    ids, rows = travel(expert[part]), travel(x[token[part]])
    drows = None if dy is None else travel(dy[token[part]])
    num_columns = NUM_DIRECTIONS if dy is None else 2 * NUM_DIRECTIONS + 1 + len(names) * (NUM_DIRECTIONS + 1)
    seen = torch.zeros(len(ids), num_columns, dtype=lens.y.dtype, device=x.device)
    for each in ids.unique().tolist():
        own = (ids == each).nonzero()[:, 0]
        known = matrices(each)  # in whatever order a system names them
        given = {name: known[name].to(x.device, lens.y.dtype) for name in names}
        seen[own] = _of_expert(given, rows[own], None if drows is None else drows[own], lens)
    return travel(seen, there=False)


def _of_expert(given: Matrices, x: torch.Tensor, dy: torch.Tensor | None, lens: Lens) -> torch.Tensor:
    """One expert on rows x, dy [n, M] -> columns as ``_apart`` takes them. Names end with those of its matrices."""
    x = x.to(lens.y.dtype)
    down = next(name for name in given if name.endswith("w2"))
    ups = sorted(given.keys() - {down})
    inner = [x @ given[name] for name in ups]
    with torch.enable_grad():
        for each in inner:
            each.requires_grad_(dy is not None)
        h = F.silu(inner[0]) * inner[1] if len(inner) > 1 else F.gelu(inner[0])
    if dy is None:
        return h @ (given[down] @ lens.y)
    dy = dy.to(lens.y.dtype)
    dh = dy @ given[down].T
    dinner = dict(zip(ups, torch.autograd.grad(h, inner, dh), strict=True))
    h = h.detach()
    dx = sum(d @ (given[name].T @ lens.dx) for name, d in dinner.items())
    assert isinstance(dx, torch.Tensor)
    columns = [h @ (given[down] @ lens.y), (h * dh).sum(1, keepdim=True), dx]
    for name in given:
        left, right = (h, dy) if name == down else (x, dinner[name])
        u, v = lens.pairs[name]
        columns += [(left @ u) * (right @ v), (_square(left) * _square(right))[:, None]]
    return torch.cat(columns, 1)


def _square(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(1)


def _largest(job: Job, count: int) -> int:
    if job.num_ranks == 1:
        return count
    largest = torch.tensor([count], device=job.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
