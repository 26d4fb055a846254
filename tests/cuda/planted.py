"""Faults on purpose, and what must not count as one: each runs in a process with the emulated device and returns what
was found as plain data. ``python -m tests.cuda.planted OUT`` runs all and writes them as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from harness.comm.handover import Held, Seen, seen
from harness.plan.graph import Plan
from harness.plan.lanes import Executor, executor
from tests.cuda import emulated
from tests.cuda.ranks import nothing_waited_for, say_where


def two_lanes(
    lanes: Executor, *, ordered: bool, held: dict[str, Any], keep: Callable[[torch.Tensor], Any] = lambda made: made
) -> dict[str, list[str]]:
    """``make`` on one lane, ``use`` on another, then ``make-more`` on the first, in memory of the same size. ``keep``:
    as what it is held."""
    plan = Plan()

    def use() -> None:
        x = held.pop("x")
        held["y"] = (x.tensor if isinstance(x, Seen) else x) + 1

    plan.add("make", "inter", run=lambda: held.update(x=keep(torch.ones(1000, device="cuda") * 2)))
    plan.add("use", "compute", ["make"] if ordered else [], run=use)
    plan.add("make-more", "inter", run=lambda: held.update(z=torch.ones(1000, device="cuda") * 3))
    plan.add("end", "compute", ["make-more"], run=lambda: held.clear())
    lanes.run(plan)
    return found()


def found() -> dict[str, list[str]]:
    races, reuses = emulated.hazards()
    return {"races": sorted(races), "reuses": sorted(reuses)}


def said(work: Callable[[], object]) -> str:
    """The error's text."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def race() -> Any:
    with executor("cuda") as lanes:
        return two_lanes(lanes, ordered=False, held={})


def reuse() -> Any:
    with executor("cuda") as lanes:
        return two_lanes(lanes, ordered=True, held={})


def recorded() -> Any:
    """As ``reuse``, but handed over as the harness does it: nothing is wrong."""
    with executor("cuda") as lanes:
        return two_lanes(lanes, ordered=True, held=Held())


def looked_at() -> Any:
    """The same of a tensor that is kept to be looked at later."""
    with executor("cuda") as lanes:
        return two_lanes(lanes, ordered=True, held=Held(), keep=seen)


def missing_wait_event() -> Any:
    with executor("cuda") as lanes, nothing_waited_for():
        return two_lanes(lanes, ordered=True, held=Held())


def host_waits() -> Any:
    """What the host has read is over, on whatever stream it was."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.ones(1000, device="cuda") * 2
        x.sum().item()
    x.add_(1)
    return found()


def columns() -> Any:
    """Halves of a buffer on two streams: no bytes in common, no race."""
    x = torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x[:500] += 1
    x[500:] += 1
    return found()


def asynchronous() -> Any:
    """A collective in flight: read before ``wait``, and after it."""
    before, after = (torch.ones(1000, device="cuda") for _ in range(2))
    work = dist.all_reduce(before, async_op=True)
    before.sum()
    work.wait()
    early = found()
    work = dist.all_reduce(after, async_op=True)
    work.wait()
    after.sum()
    return {"early": early, "late": found()}


def cpu_in_collectives() -> Any:
    x = torch.ones(3)
    into = torch.empty(3, device="cuda")
    alltoall = said(lambda: dist.all_to_all_single(into, x))
    objects = [None]
    dist.all_gather_object(objects, {"an": "object"})
    return {
        "all_reduce": said(lambda: dist.all_reduce(x)),
        "all_to_all": alltoall,
        "batch": said(lambda: dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 0)])),
        "objects": objects,
        "device": said(lambda: dist.all_reduce(into)),
        "barrier": said(dist.barrier),
    }


def mixes() -> Any:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    return {
        "sum": said(lambda: there + here),
        "product": said(lambda: there @ here),
        "index": said(lambda: here[there.long()]),
        "one_hot": said(lambda: F.one_hot(torch.tensor([0, 2])) + there),
        "in place": said(lambda: here.add_(there)),
        "numpy": said(there.numpy),
        "a number": said(lambda: torch.tensor(2.0) * there + torch.tensor(2.0)),
        "copy": said(lambda: there.copy_(here)),
        "index on the host": said(lambda: there[torch.tensor([0, 2])]),
    }


def devices() -> Any:
    """What says cuda:0, and what does not."""
    x = torch.ones(4, 3, device="cuda", requires_grad=True)
    layer = torch.nn.Linear(3, 2).to("cuda")
    layer(x).to(torch.bfloat16).float().logsumexp(-1).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    ids = torch.tensor([0, 2, 1, 1], device="cuda")
    made = {
        "ones": x,
        "number": x.sum(),
        "view": x[1:].T,
        "new_empty": x.new_empty(0),
        "arange": torch.arange(3, device=x.device),
        "as_tensor": torch.as_tensor([1, 2], device="cuda"),
        "weight": layer.weight,
        "weight's gradient": layer.weight.grad,
        "input's gradient": x.grad,
        "moment": optimizer.state[layer.weight]["exp_avg"],
        "made in C++": F.one_hot(ids),
        "gradient of a maximum": torch.autograd.grad(x.max(-1).values.sum(), x)[0],
        "gradient through the host": torch.autograd.grad((x.cpu() * 2).sum(), x)[0],
    }
    made["to"] = x.to(x.device, torch.bfloat16)
    made["like"] = torch.zeros_like(torch.zeros(2), device="cuda")
    host = {
        "cpu": x.cpu(),
        "to": x.to("cpu"),
        "new": x.new_zeros(2, device="cpu"),
        "zeros": torch.zeros(2),
        "step": optimizer.state[layer.weight]["step"],
    }
    return {
        "there": {name: (str(each.device), each.is_cuda) for name, each in made.items()},
        "here": {name: (str(each.device), each.is_cuda) for name, each in host.items()},
        "hazards": found(),
    }


def memory() -> Any:
    """Bytes allocated: before, with a tensor, after its storage was let go, given back, and dropped; and the peak."""
    torch.cuda.reset_peak_memory_stats()
    counts = [torch.cuda.memory_allocated()]
    x = torch.empty(1000, dtype=torch.float64, device="cuda")
    counts.append(torch.cuda.memory_allocated())
    x.untyped_storage().resize_(0)
    counts.append(torch.cuda.memory_allocated())
    x.untyped_storage().resize_(8000)
    counts.append(torch.cuda.memory_allocated())
    del x
    counts.append(torch.cuda.memory_allocated())
    return {"grown": [count - counts[0] for count in counts], "peak": torch.cuda.max_memory_allocated() - counts[0]}


def events() -> Any:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    end.record()
    return {"elapsed_ms": begin.elapsed_time(end), "untimed": said(lambda: torch.cuda.Event().elapsed_time(end))}


def timeline() -> Any:
    """When tasks ran by their events, and when they were issued by the host's clock; ``serial``: on which streams."""
    plan, issued, streams = Plan(), [], []

    def run() -> None:
        issued.append(time.perf_counter())
        streams.append(torch.cuda.current_stream() == torch.cuda.default_stream())
        time.sleep(0.02)

    for lane in ("compute", "inter", "intra"):
        plan.add(lane, lane, run=run)
    with executor("cuda") as lanes:
        ran = lanes.run(plan)
        time.sleep(0.1)  # it is read later
        late = [begin - then for begin, then in zip(ran.start_s, issued, strict=True)]
        lasts = (ran.end_s - ran.start_s).tolist()
        apart = list(streams)
        streams.clear()
        lanes.run(plan, serial=True)
    return {"late_s": late, "lasts_s": lasts, "calling": apart, "calling_serially": streams}


ALL = (race, reuse, recorded, looked_at, missing_wait_event, host_waits, columns, asynchronous, cpu_in_collectives,
       mixes, devices, memory, events, timeline)  # fmt: skip


def main(out: Path) -> None:
    emulated.install()
    say_where()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        answers = {}
        for each in ALL:
            with emulated.task(each.__name__):
                answers[each.__name__] = each()
            torch.cuda.synchronize()  # nothing of it is still at work
            emulated.hazards()
        out.write_text(json.dumps(answers))
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
