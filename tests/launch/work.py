"""What the ranks do in the tests of this folder."""

from __future__ import annotations


def echo(job, payload):
    return job.rank, job.num_ranks, payload
