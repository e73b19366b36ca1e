"""The best values of the weights that a mask keeps: least squares, all outputs of a matrix at once."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 16
RIDGE = 1e-2


@torch.no_grad()
def fit_masked(gram: Tensor, cross: Tensor, keep: Tensor) -> Tensor:
    """What to add to the kept weights of a matrix so that its outputs miss as little as possible.

    Minimizes for every output the squared error of `x @ delta.T` against what is missing, plus a ridge that holds the
    weights near where they are, over the entries that `keep` allows. The ridge is one number for all inputs: in units
    of each input's own size, inputs that hardly vary would get weights so large that dropout tears the model apart.
    Its unit is the squared mean of the inputs' sizes, which a single large input moves little.

    All outputs share one Gram matrix and differ in their support, so that a direct solver would factorize one matrix
    for each of them; conjugate gradients with a diagonal preconditioner, projected on the support, need one product
    with the Gram matrix an iteration for all together, whatever the density.

    Args:
        gram: `x.T @ x`, `(in, in)`, floating.
        cross: `missing.T @ x`, `(out, in)`.
        keep: the mask, `(out, in)`, of 1 and 0.

    Returns:
        `(out, in)`, zero where `keep` is.
    """
    gram = gram + ridge(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # An input that is always 0 has no say: 0 instead of a division by 0.
    precondition = keep * torch.where(gram.diagonal() > 0, 1 / gram.diagonal(), 0)
    delta, left = torch.zeros_like(cross), cross * keep
    step = left * precondition
    size = (left * step).sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        product = (step @ gram).mul_(keep)
        length = _ratio(size, (step * product).sum(1, keepdim=True))
        delta.addcmul_(step, length)
        left.addcmul_(product, -length)
        scaled = left * precondition
        before, size = size, (left * scaled).sum(1, keepdim=True)
        step = scaled.addcmul_(step, _ratio(size, before))
    return delta


def ridge(gram: Tensor) -> Tensor:
    """The ridge of a fit with this Gram matrix, a scalar."""
    return RIDGE * gram.diagonal().sqrt().mean().square()


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where an output has nothing left to fit."""
    return torch.where(below > 0, above / below, 0)
