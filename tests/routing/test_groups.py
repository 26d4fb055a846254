from __future__ import annotations

import numpy as np
import torch

from harness.layer import gates
from harness.layer.weights import Weights
from harness.routing import make_routing
from harness.specs import Model, Workload
from harness.topology import Topology

DEEPSEEK = Model(
    name="d", num_layers=1, hidden=128, ffn=8, num_experts=64, top_k=8, gate="sigmoid", num_groups=8, topk_groups=4
)


def workload(generator: str, **params: float) -> Workload:
    return Workload(name="w", tokens_per_rank=300, generator=generator, params=params)


def test_a_group_limited_gate_can_choose_every_prescribed_routing() -> None:
    """Whatever the generator wanted: the real gate, given steered inputs, takes exactly the routing's experts."""
    weights = Weights(DEEPSEEK, "float64")
    for work in (workload("balanced"), workload("zipf", target=4.0), workload("hot_rank", rank=0, share=0.3)):
        routing = make_routing(work, DEEPSEEK, Topology((2, 2)))
        assert routing is not None
        assert (np.diff(np.sort(routing.ids, axis=1), axis=1) > 0).all()  # k distinct experts
        assert max(len(set(row)) for row in (routing.ids // 8).tolist()) <= 4
        ids = torch.as_tensor(routing.ids.astype(np.int64))
        x = gates.steer(torch.randn(len(ids), 128, dtype=torch.float64), weights.router, ids)
        chosen, _ = gates.route(DEEPSEEK, x @ weights.router, weights.bias)
        assert torch.equal(chosen.sort(-1).values, ids.sort(-1).values)


def test_what_was_hot_stays_hot_and_other_gates_keep_their_routing() -> None:
    free = DEEPSEEK.model_copy(update={"gate": "gshard"})
    work = workload("zipf", target=4.0)
    wanted, limited = (make_routing(work, model, Topology((2, 2))) for model in (free, DEEPSEEK))
    assert wanted is not None
    assert limited is not None
    use = [np.bincount(routing.ids.ravel(), minlength=64) for routing in (wanted, limited)]
    hottest = [set(per_expert.argsort()[-8:].tolist()) for per_expert in use]
    assert len(hottest[0] & hottest[1]) >= 6
    assert np.corrcoef(*use)[0, 1] > 0.95
    per_group = [per_expert.reshape(8, 8).sum(1) for per_expert in use]
    np.testing.assert_allclose(per_group[1], per_group[0], rtol=0.15)  # no group is favoured
    assert (wanted.ids != limited.ids).any()
    untouched = make_routing(work, DEEPSEEK.model_copy(update={"topk_groups": 8}), Topology((2, 2)))
    assert untouched is not None
    np.testing.assert_array_equal(untouched.ids, wanted.ids)
