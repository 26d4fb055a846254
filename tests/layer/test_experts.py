"""Products of experts: both ways agree, empty experts included, and each is taken where it is right."""

from __future__ import annotations

import pytest
import torch

from harness.layer import experts
from harness.layer.experts import _GroupedMM, _LoopedMM, grouped_mm, not_grouped

CUDA, BFLOAT16 = torch.device("cuda", 0), torch.bfloat16
HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)


@pytest.fixture
def capability(monkeypatch):
    """Sets what devices can do."""

    def put(found):
        experts._capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)

    yield put
    experts._capability.cache_clear()


def product(how, counts, k, n, groups=(1,), dtype=BFLOAT16):
    """y, dx and dw of every group of matrices; ``groups``: parts of the experts."""
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(sum(counts), side, generator=generator).to(dtype) for side in (k, n))
    w = torch.randn(len(counts), k, n, generator=generator).to(dtype)
    x.requires_grad_()
    sizes = [len(counts) * part // sum(groups) for part in groups]
    ws = [part.clone().requires_grad_() for part in w.split(sizes)]
    y = how(x, counts, *ws)
    y.backward(dy)
    return [y.detach(), x.grad, torch.cat([part.grad for part in ws])]


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        ([3, 0, 5, 1], (1,)),
        ([0, 0, 0, 7], (1,)),
        ([9, 0, 0, 0], (1, 1)),  # copies of experts behind the own ones, none of which has a row
        ([2, 0, 0, 4, 4, 4], (1, 2)),
        ([1, 1, 1, 1], (1, 1, 2)),
    ],
)
def test_the_grouped_products_are_those_one_after_another(counts, groups):
    """The processor's grouped GEMM obeys the layout rules of the device's."""
    ways = (product(way.apply, counts, 24, 48, groups) for way in (_GroupedMM, _LoopedMM))
    for grouped, looped in zip(*ways, strict=True):
        assert torch.isfinite(grouped).all()
        torch.testing.assert_close(grouped, looped, rtol=2**-7, atol=2**-7)


def test_an_expert_without_rows_has_a_gradient_of_zeros_whatever_the_kernel_leaves_there(monkeypatch):
    whole = torch.nn.functional.grouped_mm

    def leaves(a, b, offs):
        made = whole(a, b, offs=offs)
        if made.ndim == 3:
            made[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return made

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves)
    dw = product(_GroupedMM.apply, [3, 0, 5, 0], 24, 48)[2]
    assert dw[[1, 3]].abs().max() == 0
    assert dw[[0, 2]].abs().min(-1).values.max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("k", "n"), [(20, 12), (24, 48), (1, 1)])
@pytest.mark.parametrize("counts", [[0, 0, 0], [4, 0, 1], [2, 2, 2]])
def test_shapes_that_no_grouped_gemm_takes(counts, k, n, dtype):
    x = torch.randn(sum(counts), k, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(3, k, n, dtype=torch.float64).to(dtype).requires_grad_()
    y = grouped_mm(x, (w,), torch.tensor(counts))
    y.backward(torch.ones_like(y))
    owner = torch.arange(3).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("rk,rkn->rn", x.detach().double(), w.detach().double()[owner])
    torch.testing.assert_close(y.detach().double(), expected, rtol=2**-7, atol=2**-6)
    assert all(not gradient.any() for gradient, count in zip(w.grad, counts, strict=True) if not count)


def matrices(k=24, n=48, num_experts=4):
    return torch.empty(num_experts, k, n, device="meta", dtype=BFLOAT16)


def test_the_grouped_gemm_is_taken_only_where_it_is_right(capability):
    capability(HOPPER)
    assert not_grouped(CUDA, BFLOAT16, matrices()) is None
    assert "for CUDA" in not_grouped(torch.device("cpu"), BFLOAT16, matrices())
    assert "not float32" in not_grouped(CUDA, torch.float32, matrices())
    assert "multiples of 8, not 20 x 12" in not_grouped(CUDA, BFLOAT16, matrices(20, 12))
    assert "multiples of 8" in not_grouped(CUDA, BFLOAT16, matrices(n=12))
    assert "less than 1024" in not_grouped(CUDA, BFLOAT16, matrices(num_experts=1024))


@pytest.mark.parametrize("found", [AMPERE, BLACKWELL, (7, 5)])
def test_no_other_device_is_trusted(capability, found):
    capability(found)
    assert f"not {found[0]}.{found[1]}" in not_grouped(CUDA, BFLOAT16, matrices())


@pytest.mark.parametrize(("num_rows", "wanted"), [(0, "looped"), (6, "grouped")])
def test_a_rank_without_rows_asks_no_grouped_gemm(monkeypatch, num_rows, wanted):
    taken = []
    monkeypatch.setattr(experts, "not_grouped", lambda *_: None)
    for name in ("_LoopedMM", "_GroupedMM"):
        way = getattr(experts, name)
        spy = type(
            name,
            (),
            {"apply": staticmethod(lambda *given, way=way, name=name: (taken.append(name), way.apply(*given))[1])},
        )
        monkeypatch.setattr(experts, name, spy)
    counts = torch.tensor([num_rows, 0])
    x, w = torch.randn(num_rows, 8, dtype=BFLOAT16), torch.randn(2, 8, 16, dtype=BFLOAT16)
    assert grouped_mm(x, (w,), counts).shape == (num_rows, 16)
    assert taken == ["_LoopedMM" if wanted == "looped" else "_GroupedMM"]
