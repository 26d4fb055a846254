"""Computation as a timed wait."""

from __future__ import annotations

import torch

from harness.layer.standin import wait
from harness.specs import Gemm


def test_parameters_get_zeros_once_however_many_pieces_there_are():
    gemm, x = Gemm(alpha_s=0.0, beta_s_per_mac=0.0), torch.ones(3, 2, requires_grad=True)
    parameters = [torch.nn.Parameter(torch.ones(4, 2, 2)), torch.nn.Parameter(torch.ones(4, 2, 2), requires_grad=False)]
    for piece in range(3):
        wait(x, gemm, 2, 1.0, parameters).sum().backward()
        assert parameters[0].grad is not None
        if not piece:
            first = parameters[0].grad
            version = first._version
        assert parameters[0].grad is first
        assert first._version == version  # not written to again
    assert not first.any()
    assert parameters[1].grad is None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
