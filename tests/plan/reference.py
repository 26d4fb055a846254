"""A slow event simulator, written apart from the one it judges: one rank, fluid rates, from event to event."""

from __future__ import annotations

from harness.plan.graph import Plan


def fluid(
    plan: Plan, durations: list[float], contention: dict[str, dict[str, float]]
) -> tuple[list[float], list[float]]:
    """Start and end of every task."""
    queues = {lane: [t for t in plan.tasks if t.lane == lane] for lane in plan.lanes}
    left = {task.name: duration for task, duration in zip(plan.tasks, durations, strict=True)}
    start: dict[str, float] = {}
    end: dict[str, float] = {}
    now = 0.0
    while any(queues.values()):
        running = {}
        for lane, waiting in queues.items():
            if waiting and all(name in end for name in waiting[0].after):
                running[lane] = waiting[0]
                start.setdefault(waiting[0].name, now)
        rates = {}
        for lane in running:
            lost = 0.0
            for other in running:
                c = contention.get(lane, {}).get(other, 0.0) if other != lane else 0.0
                lost += c / (1 + c)
            rates[lane] = 1 - lost
        step = min(left[task.name] / rates[lane] for lane, task in running.items())
        now += step
        for lane, task in running.items():
            left[task.name] -= step * rates[lane]
            if left[task.name] < 1e-12:
                end[task.name] = now
                queues[lane].pop(0)
    return [start[t.name] for t in plan.tasks], [end[t.name] for t in plan.tasks]
