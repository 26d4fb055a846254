"""Ranks agree on what has failed, and on whether they can go on without it.

    built, error = attempt(job, build)
    if reason := failed(job, error):
        ...  # all ranks have failed: a result as any other

Where one rank alone fails, the others are in a collective that it will never come to, or in the next one: nothing can
go on. Then ``failed`` never comes back, and whoever started the ranks ends them, a few seconds after the first failure
and with its own words.
"""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from harness.comm.job import Job
from harness.errors import is_echo, tells_out_of_memory, told

T = TypeVar("T")
V = TypeVar("V")
#: for the others' answers: whoever started the ranks is faster, and names the rank that failed
LIMIT = datetime.timedelta(hours=1)
END_S = 60.0  # within which a rank that has not failed is ended
_votes = itertools.count()


def attempt(job: Job, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """``work()``, or what it raised, which is told at once."""
    try:
        return work(), None
    except Exception as error:  # a system's own failure is a result
        job.failing(error)
        return None, error


def failed(job: Job, error: Exception | None) -> str | None:
    """Collective: in words, what the first rank raised, where all did; None where none did. Where some did and others
    not, raises ``error`` on those, and does not come back on the others."""
    said = None if error is None else f"rank {job.rank} in {job.doing!r}: {told(error)} (log: {job.log_path})"
    answers = _answers(job, said and json.dumps([time.time(), said]))
    if not any(answers):
        return None
    first = min((json.loads(answer) for answer in answers if answer), key=_order)[1]
    if all(answers):
        job.recovered()
        return str(first)
    if error is not None:
        raise error
    time.sleep(END_S)
    raise RuntimeError(first)


def first_said(job: Job, said: str | None) -> str | None:
    """Collective: what the first rank that has something to say says, one that is out of memory first; None if no rank
    does."""
    answers = [answer for answer in _answers(job, said) if answer]
    return next((answer for answer in answers if tells_out_of_memory(answer)), answers[0] if answers else None)


def of_all(job: Job, value: V) -> list[V]:
    """Collective: the plain ``value`` of every rank."""
    if job.num_ranks == 1:
        return [value]
    found: list[Any] = [None] * job.num_ranks
    dist.all_gather_object(found, value, group=job.world)
    return found


def status_of(reason: str) -> str:
    """Of a cell that failed, as of ``harness.bench.store.STATUSES``."""
    return "oom" if tells_out_of_memory(reason) else "failed"


def _order(answer: tuple[float, str]) -> tuple[bool, bool, float]:
    at, said = answer
    return not tells_out_of_memory(said), is_echo(said), at


def _answers(job: Job, said: str | None) -> list[str]:
    """Of every rank, through the store and not through a collective: a rank that failed inside a system's collective
    cannot meet the others in another one."""
    if job.num_ranks == 1:
        return [said or ""]
    store, vote = dist.distributed_c10d._get_default_store(), next(_votes)
    keys = [f"moebench/said/{vote}/{rank}" for rank in range(job.num_ranks)]
    store.set(keys[job.rank], said or "")
    store.wait(keys, LIMIT)
    return [store.get(key).decode() for key in keys]
