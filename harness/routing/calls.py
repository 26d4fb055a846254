"""What the experts of a Hugging Face model are called with: expert ids and weights of every token, layer by layer.

Routers differ from class to class and from version to version (bias, groups, scaling, renormalisation), so no router is
asked. Read is what reaches the experts, in one of three ways:

- *told*: an experts module is handed ids and weights. That it uses them so is tried on a few tokens: twice the weights
  make exactly twice the output, and pairs in another order make the same output.
- *probed*: experts are modules of their own, or get their rows sorted by expert, and the layer around them weighs what
  they return. The layer's output is differentiated by what each expert returned: the factor is the weight, and a code
  of 0s and 1s that comes back with it is the token.
- *scaled*: Llama 4 weighs the experts' inputs. That its router's scores are the factors is compared.

A class that is read in none of these ways is refused by its name.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, NamedTuple

import torch
from torch import nn

TRIED = 8  # tokens on which an experts module is tried
IDS = {"top_k_index", "selected_experts", "router_indices", "top_experts"}  # given to experts that are told
SIZES = {"expert_size", "tokens_per_expert"}  # given to experts that get their rows sorted by expert
SCALED = {"Llama4TextMoe"}  # layers that weigh the experts' inputs
NUM_EXPERTS = ("num_routed_experts", "num_experts", "moe_num_experts", "num_local_experts")


class Unread(Exception):
    """What a model does with its experts is not known for certain; the message says what was seen."""


class Chosen(NamedTuple):
    """One call of a layer's experts."""

    ids: torch.Tensor  # int32 [T, k], best first
    weights: torch.Tensor  # float32 [T, k]
    num_experts: int
    how: str  # told, probed or scaled


class Calls:
    """Context: what the experts in ``model`` are called with, in the order in which one forward pass calls them.

    Passes run under ``torch.no_grad`` and not in inference mode; several threads may run one each, by turns.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.hooks: list[Any] = []
        self._taken = threading.local()
        self._used: dict[nn.Module, _Use] = {}

    def __enter__(self) -> Calls:
        self.model.requires_grad_(False)
        parents = {child: parent for parent in self.model.modules() for child in parent.children()}
        probed: set[nn.Module] = set()
        for path, module in list(self.model.named_modules()):
            if _takes(module, IDS):
                self.hooks.append(module.register_forward_hook(self._told, with_kwargs=True))
            elif isinstance(module, nn.ModuleList | nn.ModuleDict) and path.endswith(".experts"):
                self._probe(parents[module], list(module.children()))
            elif _takes(module, SIZES) and not _takes(parents[module], SIZES) and parents[module] not in probed:
                probed.add(parents[module])
                self._probe(parents[module], [child for child in parents[module].children() if _takes(child, SIZES)])
            elif type(module).__name__ in SCALED:
                self._scaled(module)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def taken(self) -> list[Chosen]:
        """The calls of this thread since it asked last."""
        taken, self._taken.calls = getattr(self._taken, "calls", []), []
        return taken

    def _add(self, module: nn.Module, ids: torch.Tensor, weights: torch.Tensor, num_experts: int, how: str) -> None:
        ids, weights = ids.flatten(0, -2), weights.flatten(0, -2)
        if (weights == 0).any():
            raise Unread(f"{_name(module)} gives experts a weight of 0, so tokens may skip them")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
            reach = f"{int(ids.min())} to {int(ids.max())}"
            raise Unread(f"{_name(module)} sends tokens to experts {reach}, but only {num_experts} have weights")
        weights, order = weights.float().sort(dim=-1, descending=True, stable=True)
        made = Chosen(ids.gather(-1, order).int(), weights, num_experts, how)
        self._taken.calls = [*getattr(self._taken, "calls", []), made]

    # ---- told ------------------------------------------------------------------------------------------------------

    def _told(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        use = self._used.get(module)
        if use is None:
            use = self._used[module] = _try(module, given)
        ids, weights = given[use.ids], given[use.weights]
        self._add(module, ids, weights.gather(-1, ids) if use.by_expert else weights, _num_experts(module), "told")

    # ---- probed ----------------------------------------------------------------------------------------------------

    def _probe(self, layer: nn.Module, experts: list[nn.Module]) -> None:
        """``experts``: one module each, or modules that get rows and how many of them are each expert's; of these the
        last one that is called returns what the layer weighs."""
        returned: list[tuple[torch.Tensor, torch.Tensor]] = []  # expert of each row [N], rows [N, hidden]
        num_experts = len(experts)

        def before(*_: Any) -> None:
            returned.clear()
            torch.set_grad_enabled(True)

        def expert(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            nonlocal num_experts
            if _takes(module, SIZES):
                sizes = torch.as_tensor(args[1], device=output.device).long()
                returned.clear()
                num_experts = len(sizes)
                of = torch.arange(num_experts, device=output.device).repeat_interleave(sizes)
            else:
                of = torch.full((len(output),), experts.index(module), device=output.device)
            leaf = output.detach().requires_grad_()
            returned.append((of, leaf))
            return leaf

        def after(module: nn.Module, _: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            self._add(module, *_weighed(module, returned, y.flatten(0, -2)), num_experts, "probed")
            torch.set_grad_enabled(False)
            return (y.detach(), *output[1:]) if isinstance(output, tuple) else y.detach()

        self.hooks += [module.register_forward_hook(expert) for module in experts]
        self.hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]

    # ---- scaled ----------------------------------------------------------------------------------------------------

    def _scaled(self, layer: Any) -> None:
        seen: dict[str, torch.Tensor] = {}

        def router(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.update(x=args[0], scores=output[0])

        def experts(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, scores = seen["x"], seen["scores"]  # [T, hidden], [T, E]
            rows = args[0].view(scores.shape[1], *x.shape)
            if any(not torch.equal(row, x * score[:, None]) for row, score in zip(rows, scores.T, strict=True)):
                raise Unread(f"{_name(layer)}'s experts get other inputs than those that its router weighs")
            chosen = scores != 0
            top_k = int(chosen[0].sum())
            if not (chosen.sum(1) == top_k).all():
                raise Unread(f"{_name(layer)} gives tokens different numbers of experts")
            weights, ids = scores.topk(top_k)
            self._add(layer, ids, weights, scores.shape[1], "scaled")

        self.hooks += [layer.router.register_forward_hook(router), layer.experts.register_forward_pre_hook(experts)]


class _Use(NamedTuple):
    """Which parameters of an experts module are ids and weights."""

    ids: str
    weights: str
    by_expert: bool  # weights [T, E] instead of [T, k]


def _try(module: Any, given: dict[str, Any]) -> _Use:
    """How ``module`` uses what it is given, tried on the first tokens."""
    (ids_name,) = (name for name in given if name in IDS)
    ids = given[ids_name]
    x_name = next(name for name in given if name not in ("self", ids_name))
    num_tokens = len(ids)
    few = {
        name: value.flatten(0, -2)[:TRIED] if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
        if name != "self"
    }
    if few[x_name].ndim < given[x_name].ndim:
        few[x_name] = few[x_name].unsqueeze(0)  # [1, T, hidden], where it was [B, S, hidden]

    def output(**changed: torch.Tensor) -> torch.Tensor:
        return module.forward(*(few | changed).values()).flatten(0, -2)

    before = output()
    for name in reversed([name for name in few if name not in (ids_name, x_name)]):  # [T, k] comes after [T, E]
        weights = few[name]
        if not isinstance(weights, torch.Tensor) or not weights.is_floating_point() or len(given[name]) != num_tokens:
            continue
        if not torch.equal(output(**{name: 2 * weights}), 2 * before):
            continue
        turned = few[ids_name].flip(-1)
        uses = []
        if weights.shape == turned.shape:
            uses.append((_far(output(**{ids_name: turned, name: weights.flip(-1)}), before), False))
        if weights.shape[-1] == _num_experts(module):
            uses.append((_far(output(**{ids_name: turned}), before), True))
        far, by_expert = min(uses, default=(1.0, False))
        if far <= 1e-2:
            return _Use(ids_name, name, by_expert)
    raise Unread(f"{_name(module)} uses the weights that it is given otherwise than to weigh what its experts return")


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, over the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def _weighed(
    layer: nn.Module, returned: list[tuple[torch.Tensor, torch.Tensor]], y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, weights [T, k] by which ``y`` [T, hidden] weighs the experts' rows.

    Column 0 of a row's gradient is its weight, as column 0 of ``probe`` is 1; the next hold the token, bit by bit."""
    bits = len(y).bit_length()
    if y.shape[1] <= bits:
        raise Unread(f"{_name(layer)} has too few hidden values ({y.shape[1]}) to tell {len(y)} tokens apart")
    powers = 2 ** torch.arange(bits, device=y.device)
    probe = torch.zeros_like(y)
    probe[:, 0] = 1
    probe[:, 1 : bits + 1] = (torch.arange(len(y), device=y.device)[:, None] & powers).ne(0).to(y.dtype)
    rows = torch.cat(torch.autograd.grad(y, [leaf for _, leaf in returned], probe))  # [N, hidden]
    experts = torch.cat([of for of, _ in returned])
    tokens = rows[:, 1 : bits + 1].ne(0).long() @ powers
    counts = tokens.bincount(minlength=len(y))
    if rows[:, 0].eq(0).any():
        raise Unread(f"{_name(layer)} gives experts a weight of 0, so tokens may skip them")
    if not counts.eq(counts[0]).all():
        raise Unread(f"{_name(layer)} gives tokens different numbers of experts")
    order = tokens.argsort(stable=True)
    return experts[order].view(len(y), -1), rows[order, 0].view(len(y), -1)


def _takes(module: nn.Module, names: set[str]) -> bool:
    return not names.isdisjoint(inspect.signature(type(module).forward).parameters)


def _num_experts(module: nn.Module) -> int:
    for name in NUM_EXPERTS:
        if isinstance(number := getattr(module, name, None), int):
            return number
    raise Unread(f"{_name(module)} does not say how many experts it has")


def _name(module: nn.Module) -> str:
    return type(module).__name__
