"""Soft masks as pure functions of the weights: PDP, "Parameter-free Differentiable Pruning is All You Need" (Cho,
Adya, Naik; NeurIPS 2023; arXiv 2305.11203).

`m(w) = sigmoid((w^2 - t^2) / tau)`, the softmax over "kept" and "pruned" at equal chance where |w| = t. The effective
weight is `w m(w)`, and with t held constant its derivative is `m + (2 w^2 / tau) m (1 - m)`. `threshold` is t, a
number or a tensor that broadcasts (one value a group or a row). All in float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_NOTHING = 1e-20


@torch.no_grad()
def soft_mask(squares: Tensor, threshold: Tensor | float, tau: float) -> Tensor:
    """`sigmoid((w^2 - t^2) / tau)` from `squares` = w^2, in [0, 1], shaped like them; 0 below 1e-20.

    tau: in squared weight units; 1e-4 suits weights of standard deviation about 0.04 (BERT's encoder).
    """
    # Far below t the sigmoid underflows into subnormal numbers: too small to matter, but a matrix with two percent of
    # them is multiplied fifty times more slowly by CPUs that handle them in microcode.
    return functional.threshold_(squares.sub(threshold**2).mul_(1 / tau).sigmoid_(), _NOTHING, 0.0)


@torch.no_grad()
def soft_weight(weight: Tensor, threshold: Tensor | float, tau: float) -> Tensor:
    """`w m(w)` in the weight's dtype."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return soft_mask(wide.square(), threshold, tau).mul_(wide).to(weight.dtype)


@torch.no_grad()
def soft_gradient_(grad: Tensor, weight: Tensor, threshold: Tensor | float, tau: float) -> Tensor:
    """Turn the gradient with respect to `w m(w)` into that with respect to w, in place: times
    `m + (2 w^2 / tau) m (1 - m)`."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    squares = wide.square()
    mask = soft_mask(squares, threshold, tau)
    # m (1 + (2 w^2 / tau) (1 - m)), in the buffer of the squares
    factor = squares.mul_(2 / tau).addcmul_(squares, mask, value=-1).add_(1).mul_(mask)
    return grad.mul_(factor)


@torch.no_grad()
def soft_row_weight(weight: Tensor, threshold: Tensor | float, tau: float) -> Tensor:
    """Whole rows: `w m(norm)` with the row's root mean square in place of |w|, so that tau keeps its meaning."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return (wide * soft_mask(row_squares(wide), threshold, tau)).to(weight.dtype)


@torch.no_grad()
def soft_row_gradient_(grad: Tensor, weight: Tensor, threshold: Tensor | float, tau: float) -> Tensor:
    """`soft_gradient_` for `soft_row_weight`: `g m + (2 w / (n tau)) m (1 - m) sum(g w)` over each row of n
    weights."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    axes = tuple(range(1, weight.dim()))
    mask = soft_mask(row_squares(wide), threshold, tau)
    pull = (grad * wide).sum(axes, keepdim=True) * mask * (1 - mask) * (2 / (tau * wide[0].numel()))
    return grad.mul_(mask).addcmul_(wide, pull)


def row_squares(weight: Tensor) -> Tensor:
    """Mean square of every row (axis 0), shaped to broadcast over the weight."""
    return weight.square().mean(tuple(range(1, weight.dim())), keepdim=True)


def group_boundaries(groups: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Of every group (the last axis), the largest entry that falls and the smallest of the `keep` that stay.

    Returns:
        two tensors of the groups' shape without its last axis.
    """
    size = groups.shape[-1]
    ordered = [column.contiguous() for column in groups.unbind(-1)]
    # An odd-even sorting network: whole columns at a time, no index moves. M is small.
    for round_ in range(size):
        for i in range(round_ % 2, size - 1, 2):
            low, high = torch.minimum(ordered[i], ordered[i + 1]), torch.maximum(ordered[i], ordered[i + 1])
            ordered[i], ordered[i + 1] = low, high
    return ordered[size - keep - 1], ordered[size - keep]
