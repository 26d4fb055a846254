"""Planned memory of the busiest rank, part by part, for every system (Hecate, arXiv 2502.02581, sections 5 and 6).

Mixed precision with Adam: 2 bytes of parameter, 2 of gradient and 12 of optimizer state (master copy, two moments) for
every parameter that a rank owns. A materialised copy has its 2 bytes in every layer in which it is resident, and 2
bytes of gradient in the one layer whose backward runs. A copy of a rearranging system is a whole one: 16 bytes.

Interpretations: attention and head are replicated; activations are kept, not computed again, and attention keeps its
L x L scores (no fused kernel on a V100); the busiest rank of every layer is the same one.
"""

from __future__ import annotations

import dataclasses

from harness.layer.work import expert_parameters
from harness.specs import Model

PARAMETER, GRADIENT, OPTIMIZER, ACTIVATION = 2, 2, 12, 2  # bytes of one element
KINDS = ("parameters", "gradients", "optimizer", "activations")


@dataclasses.dataclass(frozen=True)
class Copies:
    """Experts on a rank, in units of one expert of one layer: ``owned`` with gradients and optimizer state;
    ``resident`` copies, parameters only, summed over layers; ``widest``: most copies in one layer."""

    owned: float
    resident: float = 0.0
    widest: float = 0.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one rank. ``experts_*``: of the MoE layers, what the paper's Fig. 13 shows; ``dense``: 16 bytes a
    parameter of what is replicated."""

    experts_parameters: float
    experts_gradients: float
    experts_optimizer: float
    dense: float
    activations: float

    @property
    def state(self) -> float:
        """Opt + Grad + Param of the MoE layers."""
        return self.experts_parameters + self.experts_gradients + self.experts_optimizer

    @property
    def peak(self) -> float:
        return self.state + self.dense + self.activations


def dense_parameters(model: Model) -> int:
    """Attention of all layers, token and position embeddings; the head shares the token embedding."""
    return model.num_layers * 4 * model.hidden**2 + (model.vocab + model.seq) * model.hidden


def activation_bytes(model: Model, samples: float, busiest: float) -> float:
    """Of ``samples`` sequences; ``busiest``: assignments that the busiest rank computes over the mean."""
    tokens = samples * model.seq
    # Korthikanti et al. (MLSys 2023), table 2: attention 11 L M + 5 heads L^2, two norms 4 L M, of one sample.
    attention = 15 * tokens * model.hidden + 5 * model.num_heads * model.seq * tokens
    hidden = 2 * model.ffn if model.ffn_type == "gpt" else 3 * model.ffn  # before and after the nonlinearity
    experts = busiest * tokens * model.top_k * ACTIVATION * (2 * model.hidden + hidden)
    logits = tokens * model.vocab * (ACTIVATION + 4)  # and in float32 for the loss
    return model.num_layers * (attention + experts) + logits


def memory(model: Model, copies: Copies, samples: float, busiest: float) -> Memory:
    of_expert = expert_parameters(model)
    return Memory(
        experts_parameters=PARAMETER * of_expert * (copies.owned + copies.resident),
        experts_gradients=GRADIENT * of_expert * (copies.owned + copies.widest),
        experts_optimizer=OPTIMIZER * of_expert * copies.owned,
        dense=(PARAMETER + GRADIENT + OPTIMIZER) * dense_parameters(model),
        activations=activation_bytes(model, samples, busiest),
    )


def capacity(model: Model, room_bytes: float, *, remat: bool, width: int = PARAMETER) -> int:
    """m: experts that can be materialised on a device in ``room_bytes``: copies of all layers stay from forward to
    backward, or (RM) of one; and one layer's gradients. ``width``: bytes of a parameter, and of its gradient."""
    each = width * expert_parameters(model) * ((1 if remat else model.num_layers) + 1)
    return max(0, min(model.num_experts, int(room_bytes // each)))
