"""What a cluster file asks of Slurm, checked by Slurm's own rules: what a dry run takes sbatch takes, and it means what
was meant."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import bad, unknown

#: sbatch's long options (of Slurm 22.05 to 25.05)
OPTIONS = (
    "account", "acctg-freq", "array", "batch", "bb", "bbf", "begin", "chdir", "cluster-constraint", "clusters",
    "comment", "consolidate-segments", "constraint", "container", "container-id", "contiguous", "core-spec",
    "cores-per-socket", "cpu-freq", "cpus-per-gpu", "cpus-per-task", "deadline", "delay-boot", "dependency",
    "distribution", "error", "exclude", "exclusive", "export", "export-file", "extra", "extra-node-info",
    "get-user-env", "gid", "gpu-bind", "gpu-freq", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task",
    "gres", "gres-flags", "help", "hint", "hold", "ignore-pbs", "input", "job-name", "kill-on-invalid-dep",
    "licenses", "mail-type", "mail-user", "mcs-label", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus",
    "network", "nice", "no-kill", "no-requeue", "nodefile", "nodelist", "nodes", "ntasks", "ntasks-per-core",
    "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket", "oom-kill-step", "open-mode", "output", "overcommit",
    "oversubscribe", "parsable", "partition", "power", "prefer", "priority", "profile", "propagate", "qos", "quiet",
    "reboot", "requeue", "reservation", "resv-ports", "segment", "signal", "sockets-per-node", "spread-job",
    "spread-segments", "stepmgr", "switches", "test-only", "thread-spec", "threads-per-core", "time", "time-min",
    "tmp", "tres-bind", "tres-per-task", "uid", "usage", "use-min-nodes", "verbose", "version", "wait",
    "wait-all-nodes", "wckey", "wrap",
)  # fmt: skip
#: those of them that take no value
FLAGS = {"contiguous", "hold", "ignore-pbs", "overcommit", "reboot", "spread-job", "stepmgr", "use-min-nodes"}
#: those that may do without one
EITHER = {"exclusive", "get-user-env", "nice", "no-kill", "oversubscribe", "propagate", "resv-ports"}
#: options of sbatch and srun that bind a task to one GPU, as short as these let one write them
_ONE_GPU_A_TASK = ("gpus_per_t", "tres_p", "ntasks_per_g")
#: options of theirs that are not the file's to say, and what decides instead
FOLLOWS = {
    "nodes": "write cluster: {nodes: n} in the sweep",
    "ntasks": "it follows from the interconnect",
    "ntasks_per_node": "it follows from the interconnect",
    "array": "it follows from cells_per_job and array_parallelism",
    "signal": "write signal_delay_s",
    "kill_on_bad_exit": "one rank that fails ends the others",
    "output": "logs lie in the run's folder",
    "error": "logs lie in the run's folder",
}
#: the same of sbatch alone
_FOLLOWS_TOO = {
    "time": "write timeout_min",
    "job_name": "a job is called as its run",
    "open_mode": "logs are added to",
    "requeue": "write max_restarts and max_num_timeout",
    "no_requeue": "write max_restarts and max_num_timeout",
    "wrap": "a job runs its cells",
    "chdir": "paths of a run are whole ones",
    "test_only": "use --dry-run",
    **dict.fromkeys(
        ("wait", "parsable", "quiet", "verbose", "help", "usage", "version"), "it changes what sbatch says"
    ),
    **dict.fromkeys(("uid", "gid"), "jobs are those of who submits them"),
}
_SHORT = {"N": "nodes", "n": "ntasks", "a": "array", "o": "output", "e": "error", "K": "kill_on_bad_exit"}
#: fields of a cluster file that are options of sbatch by another name
_FIELDS = {"mem": "mem_gb"}
_MEMORY = re.compile(r"([1-9][0-9]*)([KMGT]?)B?", re.IGNORECASE)
_MOST_SIGNAL_S = 65535


def check(data: Mapping[str, Any], path: Path) -> None:
    """Before the fields are looked at one by one: what would quietly spoil the times, what follows from the cells,
    wherever the file may say it, and what sbatch does not know."""
    more = data.get("additional_parameters")
    asked = {key: (key, value) for key, value in data.items()}
    if isinstance(more, Mapping):
        asked |= {str(key): (f"additional_parameters.{key}", value) for key, value in more.items()}
    if isinstance(lines := data.get("setup"), list):  # srun reads its options from variables, too
        for line in lines:
            if found := re.search(r"(gpus|tres)[_-]per[_-]task|ntasks[_-]per[_-]gpu", str(line), re.IGNORECASE):
                asked[f"srun {found[0].lower()}"] = ("setup", line)
    asked |= {f"srun {option}": (f"srun_args: {word}", value) for option, word, value in _of_srun(data)}
    for key, (field, value) in asked.items():
        option = key.removeprefix("srun ").replace("-", "_")
        if option.startswith(_ONE_GPU_A_TASK) or (option.startswith("gpu_b") and value != "none"):
            remedy = "gives each task a GPU in a cgroup of its own, which hides the others from NCCL: NVLink is lost"
            raise bad(f"{path}: {field}", value, f"{remedy} without a word; write gpus_per_node")
        of_sbatch = {**FOLLOWS, **_FOLLOWS_TOO} if field.startswith("additional_parameters") else FOLLOWS
        if option in of_sbatch:
            raise bad(f"{path}: {field}", value, f"is moebench's own; {of_sbatch[option]}")
    if isinstance(more, Mapping):
        _check_more(more, data, path)
    _check_text(data, path)


def _of_srun(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Options among srun's words: the whole name, as it is written, the value."""
    words = data.get("srun_args")
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="") if isinstance(words, list) else ():
        name, equals, value = str(word).lstrip("-").partition("=")
        if str(word).startswith("--"):
            name = name.replace("-", "_")
            whole = [option for option in FOLLOWS if option.startswith(name)]  # srun takes what is short but clear
            yield (
                (whole[0] if whole and name not in FOLLOWS else name),
                f"--{name.replace('_', '-')}",
                (value if equals else following),
            )
        elif re.match("-[A-Za-z]", str(word)) and str(word)[1] in _SHORT:
            yield _SHORT[str(word)[1]], str(word), str(word)[2:] or following


def _check_more(more: Mapping[Any, Any], data: Mapping[str, Any], path: Path) -> None:
    """``additional_parameters``: options that sbatch has, each said once, with a value if it takes one."""
    seen: dict[str, str] = {}
    for key, value in more.items():
        option, field = str(key).replace("_", "-"), f"{path}: additional_parameters.{key}"
        if option not in OPTIONS:
            raise unknown(f"{path}: additional_parameters", str(key), OPTIONS, "options of sbatch", like=option)
        own = _FIELDS.get(option, option.replace("-", "_"))
        if data.get(own) is not None or option in seen:
            raise bad(field, value, f"is also said by {seen.get(option) or own}; leave one out")
        seen[option] = f"additional_parameters.{key}"
        if value is False or (option in FLAGS and value is not True):
            raise bad(field, value, "is a switch: write true, or leave it out" if option in FLAGS else "leave it out")
        if value is True and option not in FLAGS | EITHER:
            raise bad(field, value, "needs a value")


def _check_text(data: Mapping[str, Any], path: Path) -> None:
    """No value is empty, and none ends its line of the script."""
    more = data.get("additional_parameters")
    fields = {
        **data,
        **({f"additional_parameters.{k}": v for k, v in more.items()} if isinstance(more, Mapping) else {}),
    }
    for key, value in fields.items():
        if key in ("source", "interpretation", "setup"):
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and (not each.strip() or not each.isprintable()):
                raise bad(f"{path}: {key}", each, "must be one line of text; give a value or leave the key out")


def check_sizes(asked: Mapping[str, Any], path: Path) -> None:
    """Memory, processors and times, of a file's fields by name and its ``additional_parameters``, all as one mapping
    with sbatch's words."""
    of_memory = [field for field in ("mem", "mem_per_cpu", "mem_per_gpu") if asked.get(field) is not None]
    if len(of_memory) > 1:
        names = " and ".join(_FIELDS.get(field, field) for field in of_memory)
        raise bad(f"{path}: {names}", [asked[field] for field in of_memory], "Slurm takes one of them; leave one out")
    for field in of_memory:
        value = asked[field]
        if field == "mem" and isinstance(value, float):
            if round(value * 1024) < 1:
                raise bad(f"{path}: mem_gb", value, "is less than 1 MB, and 0 MB would be the whole node")
            continue
        found = _MEMORY.fullmatch(str(value))
        if not found or (found[2].upper() == "K" and int(found[1]) < 1024):
            raise bad(
                f"{path}: {field}", value, "Slurm takes whole numbers of M, G or T, at least 1M: 2500M, for 2.5 GB"
            )
    with_gpus = [field for field in ("cpus_per_gpu", "mem_per_gpu") if asked.get(field) is not None]
    gpus = (
        asked.get("gpus_per_node")
        or asked.get("gpus")
        or asked.get("gpus_per_socket")
        or "gpu" in str(asked.get("gres"))
    )
    if with_gpus and not gpus:
        raise bad(f"{path}: {with_gpus[0]}", asked[with_gpus[0]], "of no GPUs; write gpus_per_node, too")
    if asked.get("cpus_per_gpu") is not None and asked.get("cpus_per_task") is not None:
        raise bad(f"{path}: cpus_per_gpu", asked["cpus_per_gpu"], "Slurm takes it or cpus_per_task; leave one out")
    delay_s = asked["signal_delay_s"]
    if delay_s > _MOST_SIGNAL_S or delay_s >= 60 * asked["timeout_min"]:
        most = min(_MOST_SIGNAL_S, 60 * asked["timeout_min"] - 1)
        raise bad(f"{path}: signal_delay_s", delay_s, f"must be at most {most}, of a job of {asked['timeout_min']} min")
