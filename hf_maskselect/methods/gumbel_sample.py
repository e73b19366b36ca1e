"""Masks drawn from logits: "Extracting Effective Subnetworks with Gumbel-Softmax" (Dupont, Alaoui, Sahbi, Lebois; ICIP
2022; arXiv 2202.12986).

A weight is kept with probability `sigmoid(logit)`: Gumbel-Softmax over `[logit, 0]` (the paper's Arbitrarily Shifted
Log Parametrization) needs only the difference of its two Gumbels, which is logistic noise L. The sample is hard,
`logit + L > 0`, and its gradient that of `sigmoid((logit + L) / tau)` (straight-through).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..masking.patterns import NM, grouped
from .pdp_mask import group_boundaries


@torch.no_grad()
def perturbed(logits: Tensor, generator: torch.Generator) -> Tensor:
    """`logits + L`, L logistic and independent; the sample keeps what is above 0."""
    noise = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    return noise.logit_(eps=torch.finfo(noise.dtype).tiny).add_(logits)


@torch.no_grad()
def sample(perturbed_logits: Tensor, tau: float, pattern: NM | None = None) -> tuple[Tensor, Tensor]:
    """The hard sample and the derivative of the soft one.

    Args:
        perturbed_logits: from `perturbed`.
        tau: temperature, > 0; the paper's is 1.
        pattern: keep the best N of every M along the input axis instead of what is above 0; the soft sample is then
            measured from half-way between the last that stays and the first that falls.

    Returns:
        mask (bool) and `s (1 - s) / tau` with `s = sigmoid(perturbed / tau)`, both shaped like the logits.
    """
    if pattern is None:
        mask = perturbed_logits > 0
        soft = perturbed_logits.mul(1 / tau).sigmoid_()
    else:
        mask = pattern.masks({"": perturbed_logits}, pattern.sparsity)[""]
        groups = grouped(perturbed_logits, pattern.m)
        falls, stays = group_boundaries(groups, pattern.n)
        soft = perturbed_logits.clone()
        grouped(soft, pattern.m).sub_(falls.add(stays).mul_(0.5).unsqueeze(-1))
        soft.mul_(1 / tau).sigmoid_()
    return mask, soft.addcmul_(soft, soft, value=-1).mul_(1 / tau)


@torch.no_grad()
def budget_shift(logits: Sequence[Tensor], keep: float, start: float = 0.0, tolerance: float = 1e-3) -> float:
    """theta with `sum sigmoid(logit - theta) = keep`, to within half a weight or `tolerance` of what is kept or falls,
    whichever of these is less.

    It holds the expected number of kept weights at the budget whatever the logits do: the multiplier of that
    constraint. Newton's steps from `start`, kept inside a bracket that always holds the answer.

    Raises:
        ValueError: `keep` is not inside (0, number of logits), or a logit is NaN or infinite.
    """
    total = sum(t.numel() for t in logits)
    if not 0 < keep < total:
        raise ValueError(f"keep must lie in (0, {total}) (the number of logits), got {keep}")
    allowed = max(tolerance * min(keep, total - keep), 0.5)
    smallest, largest = [float(t.min()) for t in logits], [float(t.max()) for t in logits]
    if not all(map(math.isfinite, smallest + largest)):
        raise ValueError("NaN or infinity among the logits")
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
