"""Least squares over the kept weights of a matrix, all outputs at once."""

import torch
from torch import Tensor

ITERATIONS = 16
LEAST_GAIN = 1e-3  # an iteration that gains less than this share of what all have gained is the last
RIDGE = 1e-2


@torch.no_grad()
def solve_masked(gram: Tensor, cross: Tensor, keep: Tensor) -> Tensor:
    """Return the change of the kept weights that minimizes the squared error of the outputs.

    For every output it minimizes the error of `x @ delta.T` against the missing part, plus a ridge that holds the
    weights near their values. The ridge is the same for all inputs: with a ridge in units of each input's own size,
    inputs that hardly vary would get weights so large that dropout breaks the model. Its unit is the squared mean of
    the sizes of the inputs, which a single large input hardly moves.

    All outputs share one Gram matrix but have different masks, so that a direct solver would need one factorization an
    output. Conjugate gradients, projected on the mask and with a diagonal preconditioner, need one product with the
    Gram matrix an iteration for all outputs together, at any density.

    Args:
        gram: `x.T @ x`, `(in, in)`, floating.
        cross: `missing.T @ x`, `(out, in)`.
        keep: the mask, `(out, in)`, of 1 and 0.

    Returns:
        `(out, in)`, zero where `keep` is zero.
    """
    gram = gram + ridge(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # An input that is always 0 gets no change, instead of a division by 0.
    precondition = keep * torch.where(gram.diagonal() > 0, 1 / gram.diagonal(), 0)
    delta, residual = torch.zeros_like(cross), cross * keep
    step = residual * precondition
    size, gained = (residual * step).sum(1, keepdim=True), torch.zeros((), dtype=gram.dtype, device=gram.device)
    for _ in range(ITERATIONS):
        product = (step @ gram).mul_(keep)
        length = _ratio(size, (step * product).sum(1, keepdim=True))
        delta.addcmul_(step, length)
        gain = (length * size).sum()
        gained += gain
        if not gain > LEAST_GAIN * gained:
            break
        residual.addcmul_(product, -length)
        scaled = residual * precondition
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        step = scaled.addcmul_(step, _ratio(size, before))
    return delta


def ridge(gram: Tensor) -> Tensor:
    """Return the ridge for a Gram matrix, a scalar."""
    return RIDGE * gram.diagonal().sqrt().mean().square()


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Divide, with 0 for outputs that have no error left."""
    return torch.where(below > 0, above / below, 0)
