"""What the ranks do in the tests of this folder."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import torch
import torch.distributed as dist

from harness import registry
from harness.bench import conformance
from harness.comm.agree import attempt, failed, first_said
from harness.errors import UserError
from harness.launch.network import INTERFACE, address
from harness.layer.weights import Weights
from harness.plan.graph import COMPUTE, INTER, Plan
from harness.plan.lanes import executor_of
from tests.baselines.recorded import make_case
from tests.launch.jobs import fail_with

MIB = 1 << 20


def echo(job, payload):
    print(f"rank {job.rank} echoes")
    job.progress({"rank": job.rank})
    return job.rank, payload, os.sched_getscheduler(0), torch.get_num_threads()


def total(job, payload):
    """A collective over the world, the node and the rail."""
    sums = []
    for group in (job.world, job.inner(0), job.rail(0)):
        value = torch.tensor(float(job.rank))
        if group is not None:
            dist.all_reduce(value, group=group)
        sums.append(value.item())
    return sums


def where(job, payload):
    """Device, mask and threads of this rank, and the mean of its node's ranks' ones."""
    value = torch.ones(())
    dist.all_reduce(value, group=job.inner(0))
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(job.device), mask, torch.get_num_threads(), value.item() / job.num_ranks


def time_limits(job, payload):
    """Of collectives in each of this rank's groups, seconds."""
    groups = (job.world, job.inner(0), job.rail(0))
    return {group._get_backend(job.device).options._timeout.total_seconds() for group in groups}


def say(job, payload):
    """What all ranks take for the reason where each says ``payload[rank]``."""
    return first_said(job, payload[job.rank])


def go_wrong(job, payload):
    """Rank ``payload["rank"]`` goes wrong in a phase of its own; the others wait for it."""
    job.phase("before the barrier")
    if job.rank == payload["rank"]:
        job.phase("doing mischief")
        match payload["how"]:
            case "raise":
                raise KeyError("no such expert")
            case "user":
                raise UserError("model.top_k: 9: larger than num_experts = 8")
            case "memory":
                torch.empty(1 << 50, dtype=torch.uint8)
            case "repeated memory":  # what a rank hears of another one
                raise RuntimeError("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
            case "abort":  # as C++ does where nobody catches what it throws
                words = (
                    "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n  what():  op.nbytes. 8 vs 4"
                )
                print(words, flush=True)
                os.abort()
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                threading.Thread(target=fail_with, args=[ValueError("in a thread")]).start()
                time.sleep(1000)
    dist.barrier()
    job.phase("after the barrier")


def recover(job, payload):
    """All fail alike, agree on it, and take their time afterwards."""
    _, error = attempt(job, lambda: 1 / 0)
    reason = failed(job, error)
    time.sleep(payload)
    return reason


def lose_a_lane(job, payload):
    """On rank 2 a lane raises, while its own main thread waits for ranks that wait for that lane."""
    job.phase("stepping")
    if job.rank == 2:
        plan = Plan()
        plan.add("dispatch", INTER, run=lambda: fail_with(RuntimeError("bad day")))
        plan.add("gate", COMPUTE, run=dist.barrier)
        executor_of(job).run(plan)
    else:
        dist.all_reduce(torch.zeros(1), group=job.inner(0))
        dist.all_reduce(torch.zeros(1), group=job.rail(0))
        time.sleep(1000)


def send(job, payload):
    """Send ``payload["bytes"]`` from one rank to another a few times: (start, end, bytes counted per level) each."""
    source, target = payload["source"], payload["target"]
    data = torch.ones(payload["bytes"], dtype=torch.uint8)
    seen = []
    for _ in range(payload.get("reps", 1)):
        dist.barrier()
        time.sleep(0.05)  # the buckets fill
        before = job.counters() if job.counters else None
        dist.barrier()  # nobody sends before everybody has read the counters
        start = time.perf_counter()
        if job.rank == source:
            dist.send(data, target)
        elif job.rank == target:
            dist.recv(data, source)
        end = time.perf_counter()
        dist.barrier()
        counted = before and [now - then for now, then in zip(job.counters(), before, strict=True)]
        seen.append((start, end, counted))
    return seen


def send_together(job, payload):
    """Flows (source, target) of ``payload["bytes"]`` each at once, a few times: seconds until all are done."""
    data, times = torch.ones(payload["bytes"], dtype=torch.uint8), []
    for _ in range(payload["reps"]):
        dist.barrier()
        time.sleep(0.05)  # the buckets fill
        dist.barrier()
        start = time.perf_counter()
        for source, target in payload["flows"]:
            if job.rank == source:
                dist.send(data, target)
            elif job.rank == target:
                dist.recv(data, source)
        dist.barrier()
        times.append(time.perf_counter() - start)
    return times


def sent_together(job, payload):
    """Bytes that each port of the outermost level has sent for ``send_together`` once."""
    dist.barrier()
    before = job.counters.by_port(0, INTERFACE)
    send_together(job, payload | {"reps": 1})
    after = job.counters.by_port(0, INTERFACE)
    dist.barrier()
    return [b - a for a, b in zip(before, after, strict=True)]


def exchange(job, payload):
    """Bytes that each port has sent, by level, in the forward of a layer of ``make_case(**payload["case"])``."""
    system, case = registry.system(payload["system"]), make_case(job.topology, **payload["case"])
    weights = Weights(case.model, case.dtype)
    x = conformance.draw_tokens(weights, case.routing)[0][job.rank]
    layer = system.build(case, job, weights)

    def sent():
        return [job.counters.by_port(level, INTERFACE) for level in range(job.topology.num_levels)]

    layer(x)  # connections are there from now on
    dist.barrier()
    before = sent()
    dist.barrier()
    layer(x)
    dist.barrier()
    after = sent()
    dist.barrier()
    return [[b - a for a, b in zip(*ports, strict=True)] for ports in zip(before, after, strict=True)]


def ping(job, payload):
    """Round trips of one byte over plain TCP between rank 0 and the first rank of the last node: seconds each."""
    last = job.num_ranks - job.topology.shape[-1]
    times = []
    if job.rank == last:
        with socket.create_server((address(job.topology.num_units(job.topology.num_levels - 2) - 1), 7000)) as server:
            dist.barrier()
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while byte := connection.recv(1):
                    connection.send(byte)
    else:
        dist.barrier()
    if job.rank == 0:
        nodes = job.topology.num_units(job.topology.num_levels - 2)
        with socket.create_connection((address(nodes - 1), 7000)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(payload["reps"]):
                start = time.perf_counter()
                connection.send(b"x")
                connection.recv(1)
                times.append(time.perf_counter() - start)
    dist.barrier()
    return times


def time_counters(job, payload):
    """Seconds for one reading of the counters."""
    start = time.perf_counter()
    for _ in range(50):
        job.counters()
    return (time.perf_counter() - start) / 50
