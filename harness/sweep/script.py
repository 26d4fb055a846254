"""The script of a job, as sbatch reads it: starts the tasks, and starts them again or has Slurm requeue the job.

All of that is the script's and nobody else's, since it runs on the node itself: a container in which the tasks run
needs no ``scontrol``. What it decides by is what ``srun`` says of the tasks, in a file that this node has written
itself; no node waits for another one's file to appear.
"""

from __future__ import annotations

import collections
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from harness.sweep.folder import SweepFolder
from harness.sweep.spec import SlurmCluster

AGAIN = 75  # the exit status of a rank that wants all to start again (EX_TEMPFAIL)
EARLY_S = 60  # Slurm may warn this much before the time that was asked for
_RENAMED = {"timeout_min": "time", "mem_gb": "mem"}  # submitit's words -> sbatch's
_OURS = (
    "python",
    "interconnect",
    "cells_per_job",
    "max_restarts",
    "max_num_timeout",
    "max_array_size",
    "source",
    "interpretation",
)

# The first task that ends explains the others, which srun then ends.
SCRIPT = """\
mine={folder}/${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
note() {{ printf '%s\\t%s\\t%s\\n' "$(date +%s)" "$1" "$2" >> "${{mine}}_ends"; }}  # rank 0 reads it at its next start
noted() {{ cat "${{mine}}_ends" 2> /dev/null | grep -c "$1"; }}

warned() {{  # Slurm is about to end this job
  interrupted=1
  why='for another job'
  [ "$SECONDS" -lt {late_s} ] || why='before its time limit'
  if [ "$why" = 'before its time limit' ] && [ "$(noted "$why")" -ge {max_num_timeout} ]; then
    echo 'error: timed-out too many times (max_num_timeout: {max_num_timeout})' >&2
    return
  fi
  trap '' TERM
  note stop "requeued $why"
  scontrol requeue "$SLURM_JOB_ID" && exit
  trap ended TERM  # this Slurm requeues nothing: the tasks have the time that is left
}}
ended() {{ note stop 'ended by Slurm'; exit 143; }}
trap warned USR2
trap ended TERM

srun() {{
  while :; do
    command srun "$@" 2> "${{mine}}_srun" &
    while interrupted=; wait $!; code=$?; [ "$interrupted" ]; do :; done
    cat "${{mine}}_srun" >&2
    [ $code -ne 0 ] || return 0
    first=$(grep -Em1 'srun: error: .*(: tasks? [0-9,-]+: |aunch.* failed|ode failure)' "${{mine}}_srun")
    first=${{first#*error: }}
    case $first in *'Exited with exit code '*) status=${{first##* }} ;; *) status= ;; esac
    [ "$status" != {again} ] || continue
    [ "$first" ] || [ $code -ge 128 ] || return $code  # no task has run
    [ ! "$status" ] || [ "$status" -ge 128 ] || return $code  # an error of its own, which it would make again
    note killed "${{first:-srun ended with status $code}}"
    [ "$(noted killed)" -le {max_restarts} ] && [ ! -e {cancelled} ] &&
      scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING && scontrol requeue "$SLURM_JOB_ID"
    return $code
  done
}}
"""


def parameters(folder: SweepFolder, slurm: SlurmCluster, nodes: int, tasks_per_node: int) -> dict[str, Any]:
    """Of submitit's executor, in the words of sbatch."""
    asked = slurm.model_dump(mode="python", exclude=set(_OURS), exclude_none=True)
    found = {_RENAMED.get(key, key): value for key, value in asked.items() if value is not False}
    if "mem" in found:
        found["mem"] = f"{round(found['mem'] * 1024)}MB"
    script = SCRIPT.format(
        folder=shlex.quote(str(folder.submitit)),
        cancelled=shlex.quote(str(folder.cancelled)),
        again=AGAIN,
        late_s=max(0, slurm.timeout_min * 60 - slurm.signal_delay_s - EARLY_S),
        max_num_timeout=slurm.max_num_timeout,
        max_restarts=slurm.max_restarts,
    )
    srun_args = ["--kill-on-bad-exit=1", "--distribution=block:block"]  # the ranks of a node follow one another
    if slurm.cpus_per_task:
        script += 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"\n'  # srun no longer reads that of sbatch
        srun_args.append("--cpu-bind=cores")
    pythonpath = (
        f"export PYTHONPATH={shlex.quote(str(folder.tree))} PYTHONSAFEPATH=1"  # not the folder of the submission
    )
    found |= {
        "job_name": folder.name,
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "setup": [pythonpath, *script.splitlines(), *slurm.setup],
        "srun_args": [*srun_args, *slurm.srun_args],
        # only the script is warned: it decides
        "additional_parameters": {
            "requeue": True,
            "signal": f"B:USR2@{slurm.signal_delay_s}",
            **slurm.additional_parameters,
        },
    }
    return found


def python(slurm: SlurmCluster) -> str:
    """The command that a task is, before its arguments."""
    return slurm.python or shlex.quote(sys.executable)


def texts(folder: SweepFolder, slurm: SlurmCluster, shapes: Sequence[tuple[int, int]]) -> list[str]:
    """What sbatch would read, for jobs of these ``shapes`` (nodes, tasks a node): one text a shape."""
    command = f"{python(slurm)} -u -m submitit.core._submit {shlex.quote(str(folder.submitit))}"
    return [
        _make_sbatch_string(
            command=command,
            folder=folder.submitit,
            map_count=num_jobs if num_jobs > 1 else None,
            **parameters(folder, slurm, *shape),
        )
        for shape, num_jobs in collections.Counter(shapes).items()
    ]
