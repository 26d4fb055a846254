"""What a session is told from outside, checked before anything starts."""

from __future__ import annotations

import math
import os
import re
import socket

from harness.errors import bad
from harness.specs import Cluster

START_TIMEOUT_VARIABLE = "MOEBENCH_START_TIMEOUT_S"
#: until every rank has joined the job; on GPUs each imports some 5 GB of libraries by itself, maybe from a network file
#: system that has never seen them
START_TIMEOUT_S = {"cpu": 120.0, "cuda": 600.0}


def start_timeout_s(use_cuda: bool) -> float:
    """What the environment says, or the default."""
    text = os.environ.get(START_TIMEOUT_VARIABLE)
    if not text:
        return START_TIMEOUT_S["cuda" if use_cuda else "cpu"]
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise bad(START_TIMEOUT_VARIABLE, text, "must be a number of seconds above 0; unset it for the default")
    return seconds


def check_rendezvous(cluster: Cluster, rendezvous: str | None) -> None:
    """``UserError`` unless ranks can meet there."""
    if rendezvous is None:
        return
    match = re.fullmatch(r"tcp://([^:/]+):(\d+)", rendezvous)
    if not match:
        raise bad("rendezvous", rendezvous, "write tcp://host:port, or leave it out to use a file")
    if cluster.kind == "emulated":
        raise bad("rendezvous", rendezvous, "an emulated cluster has a network of its own; leave it out")
    try:
        with socket.create_server((match[1], int(match[2]))):
            pass
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else error
        raise bad("rendezvous", rendezvous, f"{why}; choose another port, or leave it out to use a file") from None
