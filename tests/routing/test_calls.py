from __future__ import annotations

import pytest
import torch

from harness.routing.calls import Calls, Unread

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.routing import checkpoints

NUM_EXPERTS = 8
ONLY = {"phimoe": 2, "zaya": 1}  # experts a token of classes that know no other number
REFUSED = {"bamba", "doge", "zaya"}  # no experts, experts that are rows of an embedding, tokens that skip theirs
#: one of each way in which experts are called, and those whose weights do not sum to 1
FAST = ("mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "phimoe", "jetmoe", "dbrx")
ALL = checkpoints.classes()


def is_as_called(model_type: str, top_k: int) -> None:
    try:
        model = checkpoints.model(checkpoints.config(model_type, NUM_EXPERTS, top_k), shared=False)
        ids = torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:
        pytest.skip(f"transformers' own {model_type} does not run so small: {type(error).__name__}")
    try:
        with torch.no_grad(), Calls(model) as calls:
            assert calls.hooks or model_type in REFUSED
            if not calls.hooks:
                return
            model(input_ids=ids, use_cache=False)
            chosen = calls.taken()
    except Unread:
        assert model_type in REFUSED
        return
    assert chosen
    for layer in chosen:
        assert layer.ids.shape == layer.weights.shape == (48, top_k)
        assert layer.num_experts == NUM_EXPERTS
        assert (layer.weights.diff(dim=-1) <= 0).all()  # best first
        assert all(len(set(token)) == top_k for token in layer.ids.tolist())
    far = checkpoints.weighed(model, ids, chosen)
    assert len(far) == len(chosen)
    assert max(far) < 1e-5


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize("model_type", FAST)
def test_recorded_is_what_the_experts_are_called_with(model_type, top_k):
    if model_type not in ALL:
        pytest.skip("this transformers has no such class")
    if ONLY.get(model_type, top_k) == top_k:
        is_as_called(model_type, top_k)


@pytest.mark.long
@pytest.mark.parametrize("model_type", ALL)
def test_of_every_class(model_type):
    for top_k in [ONLY[model_type]] if model_type in ONLY else (1, 3, NUM_EXPERTS):
        is_as_called(model_type, top_k)
