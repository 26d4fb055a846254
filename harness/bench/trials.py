"""What systems are checked on at small shapes: tokens, gates, drops and number formats, as data."""

from __future__ import annotations

import dataclasses
from typing import Any

from harness.specs import Dtype, Model

BASE = Model(name="conformance", num_layers=1, hidden=48, ffn=24, num_experts=16, top_k=2)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One conformance case: changes to ``BASE``, the tokens of each rank, and who gets them."""

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: tuple[int, ...] = (24,)  # repeated over the ranks
    generator: str = "uniform"  # "natural": the gate chooses for itself
    params: dict[str, float | int | str] = dataclasses.field(default_factory=dict)
    identity_experts: bool = False
    dtypes: tuple[Dtype, ...] = ("float64", "float32", "bfloat16")


LONG = {"hidden": 320, "ffn": 16}
EVERY: tuple[Dtype, ...] = ("float64", "float32", "bfloat16", "float16")
TRIALS: dict[str, Trial] = {
    "uniform": Trial(dtypes=EVERY),
    "swiglu": Trial({"ffn_type": "swiglu"}, dtypes=EVERY),
    "ragged": Trial(tokens=(24, 7, 13, 1, 19)),
    "rank-without-tokens": Trial(tokens=(16, 0, 9), dtypes=EVERY),
    "experts-without-tokens": Trial(generator="empty", params={"num_empty": 5}),
    "k1": Trial({"top_k": 1}),
    "kE": Trial({"top_k": 16}, dtypes=EVERY),
    "mixtral-gate": Trial({"gate": "softmax_topk"}),
    "mixtral-gate-k1": Trial({"gate": "softmax_topk", "top_k": 1}),
    "deepseek-gate": Trial({"gate": "sigmoid", "top_k": 4, "num_groups": 4, "topk_groups": 2, "routed_scale": 2.5}),
    "sigmoid-gate": Trial({"gate": "sigmoid", "normalise_weights": False, "selection_bias": False}),
    "sigmoid-gate-k1": Trial(
        {"gate": "sigmoid", "normalise_weights": False, "selection_bias": False, "top_k": 1},
        dtypes=("float64", "float32"),
    ),
    "moge-gate": Trial({"gate": "moge", "top_k": 4, "num_groups": 2}, tokens=(24, 7, 0, 1, 19)),
    "moge-gate-drops": Trial(
        {"gate": "moge", "top_k": 4, "num_groups": 4, "capacity_factor": 1.0},
        generator="grouped",
        params={"target": 2.0},
        dtypes=("float64", "float32"),
    ),
    "xmoe-gate": Trial({"gate": "xmoe", "gate_dim": 24}),
    "xmoe-gate-drops": Trial(
        {"gate": "xmoe", "capacity_factor": 1.0}, generator="natural", dtypes=("float64", "float32")
    ),
    "shared": Trial({"num_shared_experts": 2, "shared_ffn": 40}, tokens=(24, 7, 13, 1)),
    "shared-swiglu": Trial(
        {"num_shared_experts": 1, "ffn_type": "swiglu", "gate": "softmax_topk"}, dtypes=("float64", "bfloat16")
    ),
    "expert-choice": Trial({"gate": "expert_choice"}, tokens=(24, 7, 0, 1, 19), generator="natural"),
    "softmoe": Trial({"gate": "softmoe"}, tokens=(24, 7, 0, 1, 19), generator="natural"),
    "noisy-gate": Trial({"gate_noise": True}, tokens=(24, 7, 13, 1), generator="natural"),
    "drops": Trial({"capacity_factor": 1.0}, generator="zipf", params={"target": 3.0}),
    "exchange": Trial({"top_k": 4}, identity_experts=True, dtypes=EVERY),
    # What fits into one buffer of any size below these, or into the first columns, shows itself here.
    "long": Trial(LONG, (160, 70, 129, 65), generator="zipf", params={"target": 2.0}, dtypes=("float64",)),
    "long-drops": Trial(
        LONG | {"capacity_factor": 1.0}, (130,), generator="zipf", params={"target": 2.0}, dtypes=("float64",)
    ),
    "long-exchange": Trial(LONG | {"top_k": 4}, (160, 70, 129, 65), identity_experts=True, dtypes=("bfloat16",)),
}
#: what ``System.variants`` go through, and what ``System.chunked`` do
VARIANT_TRIALS, TRAINING = ("uniform", "ragged", "experts-without-tokens", "drops"), "training"
CHUNKED_TRIALS, SHARED_TRIALS = ("long", "long-drops"), ("shared", "shared-swiglu")
