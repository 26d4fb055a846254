"""What is a routing and what is none: checks of all that is written to a trace, or read from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harness.errors import bad

if TYPE_CHECKING:
    from harness.routing.trace import Header, Recorded

MOST = 2**31 - 1
FEW = 200_000  # ids; more are checked by a compiled loop


def check_row(row: Recorded, header: Header, where: str = "trace") -> None:
    """``UserError`` naming step and layer for what is no routing of ``header``'s model: ids that are not whole, out of
    range or twice in a token, counts that no tokens have, wrong shapes."""
    where = f"{where}: step {row.step}, layer {row.layer}"
    for name, value, least, most in (("step", row.step, 0, None), ("layer", row.layer, 0, header.num_layers - 1)):
        if value != int(value) or value < least or (most is not None and value > most):
            of = "" if most is None else f" {value} of {header.num_layers}"
            raise bad(where, value, f"{name}{of} is none; give whole numbers from {least} on")
    if header.kind == "counts":
        check_counts(row.counts, row.ranks, header.top_k, f"{where}: counts")
        return
    none = row.weights.shape == (0, header.top_k)  # are known
    if row.ids.ndim != 2 or row.ids.shape[1] != header.top_k or not (none or row.weights.shape == row.ids.shape):
        shapes = f"ids {list(row.ids.shape)}" + ("" if none else f", weights {list(row.weights.shape)}")
        raise bad(where, shapes, f"must {'' if none else 'both '}be [tokens, top_k = {header.top_k}]")
    if row.ranks is not None and (min(row.ranks, default=0) < 0 or sum(row.ranks) != len(row.ids)):
        raise bad(f"{where}: tokens of ranks", list(row.ranks), f"must sum to its {len(row.ids)} tokens")
    check_ids(row.ids, header.num_experts, f"{where}: ids")


def check_ids(ids: np.ndarray, num_experts: int, where: str) -> None:
    """``UserError`` naming ``where`` and the token, if ids [T, k] are not whole numbers of 0 to E - 1, no expert twice
    in a token."""
    if not np.issubdtype(ids.dtype, np.integer):
        broken = np.argwhere(~(ids == np.rint(ids))) if np.issubdtype(ids.dtype, np.floating) else [None]
        if len(broken):
            token, value = (0, str(ids.dtype)) if broken[0] is None else (int(broken[0][0]), float(ids[*broken[0]]))
            raise bad(f"{where}: token {token}", value, "expert ids must be whole numbers")
    if ids.size > FEW and not _wrong_in(ids, num_experts):
        return
    outside = np.argwhere((ids < 0) | (ids >= num_experts))
    if len(outside):
        token, place = outside[0]
        wrong = ids[token, place].item()
        raise bad(f"{where}: token {token}", wrong, f"there is no expert {wrong} of {num_experts}, counted from 0")
    ordered = np.sort(ids, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if len(twice):
        token, place = twice[0]
        raise bad(f"{where}: token {token}", ordered[token, place].item(), "is chosen twice; experts must be distinct")


def _wrong_in(ids: np.ndarray, num_experts: int) -> bool:
    from harness.routing.loops import has_wrong  # numba only where there is much to check

    if ids.dtype not in (np.uint8, np.uint16, np.int64):
        with np.errstate(invalid="ignore"):
            ids = ids.astype(np.int64)
    return bool(has_wrong(np.ascontiguousarray(ids), num_experts))


def check_counts(counts: np.ndarray, ranks: tuple[int, ...] | None, top_k: int, where: str) -> None:
    """``UserError`` if counts [R, E], of each rank's tokens, are not those of some tokens with ``top_k`` distinct
    experts each: of ``ranks`` tokens, where these are told."""
    if counts.ndim != 2:
        raise bad(where, list(counts.shape), "must be [ranks, experts]")
    if not np.issubdtype(counts.dtype, np.integer):
        broken = np.argwhere(~(counts == np.rint(counts)))
        if len(broken):
            value = float(counts[*broken[0]])
            raise bad(f"{where}{_at(counts, broken[0])}", value, "counts must be whole numbers")
    if len(wrong := np.argwhere(counts < 0)):
        raise bad(f"{where}{_at(counts, wrong[0])}", counts[*wrong[0]].item(), "a count cannot be negative")
    if len(wrong := np.argwhere(counts > MOST)):
        raise bad(
            f"{where}{_at(counts, wrong[0])}", counts[*wrong[0]].item(), f"at most {MOST} are held; scale them down"
        )
    sums = counts.sum(1)
    for rank, total in enumerate(sums.tolist()):
        of = f" of rank {rank}" if len(counts) > 1 else ""
        wanted = None if ranks is None else ranks[rank] * top_k
        if total % top_k or (wanted is not None and wanted != total):
            remedy = f"do not sum to tokens x k: k = {top_k}"
            remedy += "" if wanted is None else f", {ranks[rank]} tokens"  # type: ignore[index]
            raise bad(f"{where}{of}", int(total), f"{remedy}; give the right --top-k, and counts from before any drops")
    above = np.argwhere(counts > (sums // top_k)[:, None])
    if len(above):
        rank, expert = above[0]
        remedy = f"is above the {int(sums[rank]) // top_k} tokens there are; a token takes an expert once"
        raise bad(f"{where}{_at(counts, above[0])}", counts[rank, expert].item(), remedy)


def _at(counts: np.ndarray, place: np.ndarray) -> str:
    rank, expert = map(int, place)
    return f" of rank {rank}, expert {expert}" if len(counts) > 1 else f" of expert {expert}"
