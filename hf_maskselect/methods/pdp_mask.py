"""The soft mask of PDP (NeurIPS 2023; arXiv 2305.11203) and its gradient, as pure functions of the weights.

`m(w) = sigmoid((w^2 - t^2) / tau)` is the softmax over "kept" and "pruned", with equal chances where |w| = t. The
effective weight is `w m(w)`. Its derivative, with t held constant, is `m + (2 w^2 / tau) m (1 - m)`. Weights that are
pruned together share the mask of their root mean square.

With a fixed factor f for every weight (ours), the mask compares `f |w|` with t: it is `sigmoid((f^2 w^2 - t^2) /
tau)`, and the derivative is `m + (2 f^2 w^2 / tau) m (1 - m)`.

`threshold` is t; it and `tau` are numbers or tensors that broadcast. The functions compute in float32 or wider.
"""

import math

import torch
from torch import Tensor

_NOTHING = 1e-20


@torch.no_grad()
def soft_mask(squares: Tensor, threshold: Tensor | float, tau: Tensor | float) -> Tensor:
    """`sigmoid((w^2 - t^2) / tau)` from `squares` = w^2 or f^2 w^2, in [0, 1], shaped like them; 0 below 1e-20.

    tau: in the units of `squares`; 1e-4 suits weights of standard deviation about 0.04 (BERT's encoder).
    """
    # Far below t the sigmoid underflows into subnormal numbers. They are too small to matter, but a matrix with two
    # percent of them is multiplied fifty times more slowly by CPUs that handle them in microcode.
    return torch.threshold_(squares.sub(threshold**2).mul_(1 / tau).sigmoid_(), _NOTHING, 0.0)


@torch.no_grad()
def soft_weight(
    weight: Tensor,
    threshold: Tensor | float,
    tau: Tensor | float,
    unit_axes: tuple[int, ...] = (),
    factor: Tensor | None = None,
) -> Tensor:
    """`w m(w)` in the weight's dtype; weights along `unit_axes` share one mask value. `factor` is f, 1 where None."""
    wide = _wide(weight)
    mask = soft_mask(_squares(wide, unit_axes, factor), threshold, tau)
    return (mask.mul(wide) if unit_axes else mask.mul_(wide)).to(weight.dtype)


@torch.no_grad()
def soft_gradient_(
    grad: Tensor,
    weight: Tensor,
    threshold: Tensor | float,
    tau: Tensor | float,
    unit_axes: tuple[int, ...] = (),
    factor: Tensor | None = None,
) -> Tensor:
    """Turn the gradient with respect to `w m(w)` into that with respect to w, in place.

    It is `g (m + (2 f^2 w^2 / tau) m (1 - m))`; for units of n weights `g m + (2 f^2 w / (n tau)) m (1 - m) sum(g w)`.
    """
    wide = _wide(weight)
    squares = _squares(wide, unit_axes, factor)
    mask = soft_mask(squares, threshold, tau)
    if unit_axes:
        size = math.prod(weight.shape[axis] for axis in unit_axes)
        pull = (grad * wide).sum(unit_axes, keepdim=True) * mask * (1 - mask) * (2 / (tau * size))
        return grad.mul_(mask).addcmul_(wide if factor is None else wide * factor * factor, pull)
    # m (1 + (2 f^2 w^2 / tau) (1 - m)), in the buffer of the squares
    slope = squares.mul_(2 / tau).addcmul_(squares, mask, value=-1).add_(1).mul_(mask)
    return grad.mul_(slope)


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _squares(weight: Tensor, unit_axes: tuple[int, ...], factor: Tensor | None) -> Tensor:
    """Squares of `f w`, or their mean over every unit, shaped to broadcast over the weight."""
    squares = weight.square() if factor is None else (weight * factor).square_()
    return squares.mean(unit_axes, keepdim=True) if unit_axes else squares
