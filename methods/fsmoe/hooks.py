"""The six places at which a user may step in (FSMoE, arXiv 2501.10714, section 3.2), without touching the schedule."""

from __future__ import annotations

import torch


class Hooks:
    """Does nothing anywhere; override what is wanted.

    ``before_moe_start`` and ``before_moe_end`` see the layer's tokens and are differentiated through. The other four
    see what is about to cross the network, or just has, chunk by chunk on the communication lane, forward and
    backward alike; a pair must give back what it was given (compress, decompress), or be an approximation of it.

    Interpretation: the paper does not say whether the four act on gradients too. Here they do: gradients cross the same
    links.
    """

    def before_moe_start(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [T, M] as they enter, before the gate."""
        return x

    def before_dispatch(self, parts: torch.Tensor) -> torch.Tensor:
        """[num_ep, ...] of one chunk on the way to the experts."""
        return parts

    def after_dispatch(self, parts: torch.Tensor) -> torch.Tensor:
        """The same at the experts' side."""
        return parts

    def before_combine(self, parts: torch.Tensor) -> torch.Tensor:
        """[num_ep, ...] of one chunk on the way back."""
        return parts

    def after_combine(self, parts: torch.Tensor) -> torch.Tensor:
        """The same back home."""
        return parts

    def before_moe_end(self, y: torch.Tensor) -> torch.Tensor:
        """Tokens [T, M] as they leave."""
        return y
