"""Plain FSDP on experts: every rank gathers all experts of a layer before it, and reduces all their gradients after it.

Parameters, gradients and optimizer state are sharded, as in Hecate, but which experts are gathered does not depend on
the load: all of them, in forward and again in backward. No token travels.
"""

from __future__ import annotations


def gathered_bytes(num_experts: int, expert_bytes: float, num_units: int) -> float:
    """What passes the port of one of ``num_units`` (ranks or nodes) when all of them gather all experts that they share
    out evenly; as much when gradients are reduced."""
    return num_experts * expert_bytes * (num_units - 1) / num_units
