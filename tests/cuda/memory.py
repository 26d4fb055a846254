"""The device's memory: a caching allocator with one pool a stream, and who uses which bytes on which stream.

As in torch, a block belongs to the pool of the stream on which it was allocated, goes back there as soon as nothing
refers to it, and is handed out again at once. Two things can then go wrong, and both are silent on a real device:

a *race*: two streams use the same bytes, one of them writes, and nothing orders them;
a *reuse*: a block is handed out again while work of its last owner, on another stream, may not have run yet, because
nobody told the allocator of that stream (``Tensor.record_stream``) or waited for it.

A block hangs on the storage of the CPU tensor that holds its data: the block ends when the storage does.
"""

from __future__ import annotations

import bisect
import collections
from typing import NamedTuple

import torch

from tests.cuda import streams
from tests.cuda.streams import Stream

_ROUND_BYTES = 512
_SMALL_BYTES = 1 << 20  # a larger block is not cut up for a smaller need


class Use(NamedTuple):
    """Bytes ``low`` to ``high`` of a block, on a stream, as its ``number``-th piece of work, in the task ``task``."""

    low: int
    high: int
    stream: int
    number: int
    task: str
    writes: bool


class Hazards:
    """What was found, by text, and how often."""

    def __init__(self) -> None:
        self.races: collections.Counter[str] = collections.Counter()
        self.reuses: collections.Counter[str] = collections.Counter()

    def drain(self) -> tuple[dict[str, int], dict[str, int]]:
        """Races and reuses so far; counting begins anew."""
        found = dict(self.races), dict(self.reuses)
        self.races.clear()
        self.reuses.clear()
        return found


hazards = Hazards()
#: what is being done, for messages: the task of a plan, or whatever the driver says
task = "no task"
#: bytes allocated now, and the most so far
now_bytes = peak_bytes = 0


class _Free(NamedTuple):
    size: int
    last: dict[int, tuple[int, str]]  # by stream: the last piece of work that may still use it, and its task
    born: str

    def is_in_use(self, stream: Stream) -> bool:
        """Whether work of its last owners is not behind ``stream`` yet."""
        return any(not stream.is_behind(other, number) for other, (number, _) in self.last.items())


_pools: dict[int, list[_Free]] = collections.defaultdict(list)  # by stream, smallest first
#: what came back too early, by stream; a real allocator may hand out any of it, so this one does first of all
_early: dict[int, list[_Free]] = collections.defaultdict(list)


def _take(pool_of: int, size: int) -> _Free | None:
    """A free block of at least ``size`` bytes."""
    pool, stream, early = _pools[pool_of], Stream.all[pool_of], _early[pool_of]
    for free in [free for free in early if not free.is_in_use(stream)]:  # by now it is over
        early.remove(free)
        bisect.insort(pool, free, key=lambda each: each.size)
    for free in early:
        if _fits(free, size):
            early.remove(free)
            return free
    at = bisect.bisect_left(pool, size, key=lambda each: each.size)  # the best fit
    return pool.pop(at) if at < len(pool) and _fits(pool[at], size) else None


def _fits(free: _Free, size: int) -> bool:
    return free.size >= size and (size <= _SMALL_BYTES or free.size < 2 * size + _SMALL_BYTES)


class Block:
    """Memory of one storage, allocated now on the current stream."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.held = False
        self.allocate()

    def allocate(self) -> None:
        global now_bytes, peak_bytes
        self.pool, self.born, self.recorded = streams.current().id, task, set[int]()
        self.uses: list[Use] = []
        self.last: dict[int, tuple[int, str]] = {}  # work of the owners before, by stream
        self.was_born = ""
        self.size = max(_ROUND_BYTES, -(-self.num_bytes // _ROUND_BYTES) * _ROUND_BYTES)
        if not self.num_bytes:
            return
        self.held = True
        if (free := _take(self.pool, self.size)) is not None:
            self.size, self.last, self.was_born = free
        now_bytes += self.size
        peak_bytes = max(peak_bytes, now_bytes)

    def free(self) -> None:
        """Back to its pool. The streams of which the allocator was told are waited for, as far as they have got now,
        before it is handed out."""
        global now_bytes
        if not self.held:
            return
        self.held = False
        now_bytes -= self.size
        last, recorded = self.last, [Stream.all[each] for each in self.recorded]
        for use in self.uses:
            waited_for = any(stream.is_behind(use.stream, use.number) for stream in recorded)
            if not waited_for and last.get(use.stream, (-1, ""))[0] < use.number:
                last[use.stream] = (use.number, use.task)
        free = _Free(self.size, last, self.born)
        if free.is_in_use(Stream.all[self.pool]):
            _early[self.pool].append(free)
        else:
            bisect.insort(_pools[self.pool], free, key=lambda each: each.size)

    def __del__(self) -> None:
        self.free()

    def use(self, what: str, low: int, high: int, stream: Stream, number: int, writes: bool) -> None:
        """``what``: the operation, for messages."""
        for other, (last, by) in self.last.items():
            if not stream.is_behind(other, last):
                hazards.reuses[
                    f"[{task}] uses, on {stream.name}, memory of {Stream.all[self.pool].name} that was allocated in "
                    f"[{self.was_born}] and that [{by}] may still use on {Stream.all[other].name}"
                ] += 1
        kept = []
        for use in self.uses:
            if use.low < high and low < use.high:
                ordered = stream.is_behind(use.stream, use.number)
                if not ordered and (writes or use.writes):
                    hazards.races[
                        f"[{task}] {'writes' if writes else 'reads'}, on {stream.name} ({what}), what [{use.task}] "
                        f"{'writes' if use.writes else 'reads'} on {Stream.all[use.stream].name}, in no order"
                    ] += 1
                covered = low <= use.low and use.high <= high and ordered
                if covered and (writes or (use.stream == stream.id and not use.writes)):
                    continue  # whoever is behind this use is behind that one
            kept.append(use)
        kept.append(Use(low, high, stream.id, number, task, writes))
        self.uses = kept


def block_of(tensor: torch.Tensor) -> Block | None:
    """None: on the host."""
    return getattr(tensor.untyped_storage(), "block", None)


def place(tensor: torch.Tensor) -> Block:
    """The tensor's storage is on the device from now on."""
    storage = tensor.untyped_storage()
    storage.block = Block(storage.nbytes())  # type: ignore[attr-defined]
    return storage.block  # type: ignore[attr-defined]


def use(what: str, tensors: list[tuple[torch.Tensor, Block, bool]]) -> None:
    """One piece of work on the current stream. ``tensors``: with their blocks, and whether it writes them."""
    stream = streams.current()
    number = stream.tick()
    for tensor, block, writes in tensors:
        if block.held:
            low, high = span(tensor)
            if high > low:
                block.use(what, low, high, stream, number, writes)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte, exclusive, in its storage."""
    size, low = tensor.element_size(), tensor.storage_offset()
    if tensor.is_contiguous():
        return low * size, (low + tensor.numel()) * size
    if not tensor.numel():
        return 0, 0
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return low * size, (low + reach + 1) * size
