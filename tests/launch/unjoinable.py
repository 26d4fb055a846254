"""Imported ahead of a fork, it makes one rank fail where it joins the others."""

from __future__ import annotations

import errno
import os

import torch.distributed as dist

_join = dist.init_process_group


def _fail(*args, rank, **more):
    if rank == 2:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
    _join(*args, rank=rank, **more)


dist.init_process_group = _fail
