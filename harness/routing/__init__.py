"""Where tokens go: generators, recorded traces, certificates."""

from harness.routing.certificate import Certificate, certify
from harness.routing.make import KNOWN_GENERATORS, counts_of, make_routing, planned_routing, sampled_routing
from harness.routing.types import Routing

__all__ = [
    "KNOWN_GENERATORS",
    "Certificate",
    "Routing",
    "certify",
    "counts_of",
    "make_routing",
    "planned_routing",
    "sampled_routing",
]
