"""Masks drawn from logits, as in "Extracting Effective Subnetworks with Gumbel-Softmax" (ICIP 2022; arXiv 2202.12986).

A weight is kept with probability `sigmoid(logit)`. Gumbel-Softmax over `[logit, 0]` (the paper's Arbitrarily Shifted
Log Parametrization) needs only the difference of its two Gumbels, which is logistic noise L. The sample is hard,
`logit + L > 0`; its gradient is that of `sigmoid((logit + L) / tau)` (straight-through).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..masking.groups import Groups


@torch.no_grad()
def perturbed(logits: Tensor, generator: torch.Generator) -> Tensor:
    """`logits + L` with independent logistic noise L; a sample keeps the entries above 0."""
    noise = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    return noise.logit_(eps=torch.finfo(noise.dtype).tiny).add_(logits)


@torch.no_grad()
def sample(perturbed_logits: Tensor, tau: float, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
    """The hard sample, and the derivative of the soft sample.

    Args:
        perturbed_logits: from `perturbed`.
        tau: temperature, > 0; the paper's is 1.
        groups: keep the best of every group instead of the entries above 0. The soft sample is then measured from the
            middle between the smallest kept and the largest dropped entry of the group.

    Returns:
        Mask (bool) and `s (1 - s) / tau` with `s = sigmoid(perturbed / tau)`, both shaped like the logits.
    """
    if groups is None:
        mask = perturbed_logits > 0
        soft = perturbed_logits.mul(1 / tau).sigmoid_()
    else:
        mask = groups.best(perturbed_logits)
        soft = perturbed_logits.clone()
        groups.view(soft).sub_(groups.middle(perturbed_logits))
        soft.mul_(1 / tau).sigmoid_()
    return mask, soft.addcmul_(soft, soft, value=-1).mul_(1 / tau)


@torch.no_grad()
def budget_shift(logits: Sequence[Tensor], keep: float, start: float = 0.0, tolerance: float = 1e-3) -> float:
    """Find theta with `sum sigmoid(logit - theta) = keep`, by Newton's method inside a bracket.

    Subtracted from all logits, theta holds the expected number of kept weights at `keep`. The error is at most half a
    weight, or `tolerance` times the kept or the pruned weights, whichever are fewer. `start` is the first guess, which
    decides the last bits of the answer.

    Raises:
        ValueError: `keep` is not inside (0, number of logits), or a logit is NaN or infinite.
    """
    total = sum(t.numel() for t in logits)
    if not 0 < keep < total:
        raise ValueError(f"keep must lie in (0, {total}) (the number of logits), got {keep}")
    allowed = max(tolerance * min(keep, total - keep), 0.5)
    smallest, largest = [float(t.min()) for t in logits], [float(t.max()) for t in logits]
    if not all(map(math.isfinite, smallest + largest)):
        raise ValueError("NaN or infinity among the logits: lower gumbel_learning_rate")
    # At these ends even the extreme logits are surely kept or surely dropped.
    low, high = min(smallest) - 40.0, max(largest) + 40.0
    theta = min(max(start, low), high)
    while high - low > 1e-6:
        expected, slope = 0.0, 0.0
        for t in logits:
            chance = t.sub(theta).sigmoid_()
            kept = float(chance.sum(dtype=torch.float64))
            expected += kept
            slope += kept - float(chance.square_().sum(dtype=torch.float64))
        if abs(expected - keep) <= allowed:
            return theta
        low, high = (theta, high) if expected > keep else (low, theta)
        step = theta + (expected - keep) / slope if slope > 0 else low
        theta = step if low < step < high else (low + high) / 2
    return theta
