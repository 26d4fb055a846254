"""What a run says while it lasts: on stderr, a bar with the time that remains, and what did not go well, at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from harness.bench.run import Plan


def columns() -> tuple[ProgressColumn, ...]:
    """What is told of how far it is, with the time that remains."""
    return (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )


@contextlib.contextmanager
def shown(plans: Sequence[Plan], show: bool) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A progress bar with the time that remains, on stderr."""
    console = Console(stderr=True)
    if not show:
        yield None
        return
    cells = {experiment.digest for each in plans for _, race in each.tasks for experiment in race.experiments}
    launches = {launch for each in plans for launch, _ in each.tasks}
    if not cells:
        console.print("everything in this suite is finished; nothing to run", highlight=False)
        yield None
        return
    seconds = sum(each.estimate_s for each in plans)
    times = f" in {len(launches)} launches" if len(launches) > 1 else ""
    console.print(f"{len(cells)} cells to run{times}, about {max(1, round(seconds / 60))} min", highlight=False)
    with Progress(*columns(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting ranks", total=sum(each.num_units for each in plans))
        finished = 0

        def on_progress(message: dict[str, Any]) -> None:
            nonlocal finished
            if message["did"] == "begin":
                bar.update(task, description=message["text"])
                if not console.is_terminal:
                    console.print(message["text"], markup=False, highlight=False, soft_wrap=True)
            elif message["did"] in ("setback", "note"):
                console.print(message["text"], markup=False, highlight=False, soft_wrap=True)
            elif message["did"] == "race":  # exact again, whatever was refused, failed or repeated inside
                finished += message["units"]
                bar.update(task, completed=finished)
            else:
                bar.advance(task)

        yield on_progress
