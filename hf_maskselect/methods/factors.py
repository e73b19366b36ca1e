"""One fixed factor a weight, by which magnitudes rank like the scores of a criterion.

A soft mask that compares `factor * |w|` instead of |w| starts with the criterion's ranking, and still follows the
weights as they train. The factors of a matrix have the mean 1, and are held in half precision.
"""

import torch
from torch import Tensor

from ..masking.base import Pattern

# Below and above, a half-precision number loses digits or is infinite. A weight whose gradients are zero keeps a
# factor, so that it can come back.
_LEAST, _MOST = 2.0**-14, 65504.0
_CHANGE = 4.0  # by a refit, at most


@torch.no_grad()
def factors(score: Tensor, units: Tensor, weight: Tensor, pattern: Pattern, degree: float) -> Tensor:
    """Factors (float16, shaped like `weight`) for which unit sizes of `factor * |weight|` rank like `units`.

    Args:
        score: scores of the weights of one matrix, >= 0.
        units: the scores of its units, from `pattern.unit_scores(score)` and `pattern.comparable`.
        weight: the matrix.
        pattern: says which weights are one unit. Its size is the root mean square of its weights.
        degree: the power of |w| that a score grows with. Its root is taken, since a product grows like |w|.

    A weight that is zero gets the mean factor, as do all weights of a matrix whose scores are zero.
    """
    wanted = units.pow(1 / degree)
    if pattern.unit_size(weight.shape) > 1:
        products = score.pow(1 / degree)
        sizes = pattern.unit_sizes(products)
        products.mul_(pattern.spread(torch.where(sizes > 0, wanted / sizes, 0.0), products))
    else:
        products = wanted
    factor = products / weight.abs().float()
    known = factor.isfinite()
    mean = torch.where(known, factor, 0.0).sum(dtype=torch.float64) / known.sum().clamp_min(1)
    if not mean > 0:
        return torch.ones_like(factor, dtype=torch.float16)
    factor.div_(mean.float()).masked_fill_(known.logical_not(), 1.0)
    return factor.clamp_(_LEAST, _MOST).half()


@torch.no_grad()
def refitted_factors(factor: Tensor | None, before: Tensor, weight: Tensor) -> Tensor:
    """Factors (float16) for which the products of refitted weights are what they were before the refit.

    A factor changes at most fourfold: a weight that the refit has made nearly zero may go.

    Args:
        factor: the factors before; None for ones.
        before: the weights before the refit.
        weight: the refitted ones.
    """
    change = before.abs().float().div_(weight.abs().float()).clamp_(1 / _CHANGE, _CHANGE).nan_to_num_(nan=1.0)
    return (change if factor is None else change.mul_(factor)).clamp_(_LEAST, _MOST).half()
