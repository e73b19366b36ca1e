"""How many weights every matrix keeps, and the joint ranking of several matrices."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .ranking import top_k_masks

# (pools of scores, how many entries of each pool to keep) -> by pool, the masks and the kept entries of each tensor
TopK = Callable[[Sequence[Sequence[Tensor]], Sequence[int]], tuple[list[list[Tensor]], list[list[int]]]]


def kept_count(total: int, sparsity: float) -> int:
    """Number of `total` weights that stay at `sparsity`, in [0, 1): the zeros are `round(total * sparsity)`."""
    return total - round(total * sparsity)


def allocate(keep: int, sizes: Sequence[int], capacities: Sequence[int]) -> list[int]:
    """Share `keep` over matrices in proportion to `sizes`, none above its capacity, the sum exact.

    A matrix that cannot take its share is filled, and the rest is shared again. Fractions go to the largest
    remainders, ties by index. Raises a ValueError if the capacities are too small.
    """
    if keep > sum(capacities):
        raise ValueError(too_few(keep, sum(capacities)))
    quotas = [0] * len(sizes)
    open_ = list(range(len(sizes)))
    left = keep
    while True:
        weight = sum(sizes[i] for i in open_)
        full = [i for i in open_ if left * sizes[i] >= capacities[i] * weight]
        if not full:
            break
        for i in full:
            quotas[i] = capacities[i]
            left -= capacities[i]
        open_ = [i for i in open_ if i not in full]
        if not open_:
            return quotas
    for i in open_:
        quotas[i] = left * sizes[i] // weight
    by_remainder = sorted(open_, key=lambda i: (-(left * sizes[i] % weight), i))
    for i in by_remainder[: left - sum(quotas[i] for i in open_)]:
        quotas[i] += 1
    return quotas


def top_k(pools: Sequence[Sequence[Tensor]], ks: Sequence[int]) -> tuple[list[list[Tensor]], list[list[int]]]:
    """`ranking.top_k_masks` of several pools, with the number of kept entries of each tensor."""
    masks = [top_k_masks(pool, k) for pool, k in zip(pools, ks, strict=True)]
    return masks, [[int(torch.count_nonzero(mask)) for mask in pool] for pool in masks]


def joint_masks(scores: list[Tensor], keep: int, floors: Sequence[int], top_k: TopK) -> list[Tensor]:
    """Masks of the `keep` largest scores of all matrices together, at least `floors[i]` of them in matrix i.

    A matrix that would fall below its floor keeps its own best instead, and the others are ranked again.
    """
    open_, own = list(range(len(scores))), []
    while True:
        (joint,), (counts,) = top_k([[scores[i] for i in open_]], [keep])
        short = [i for i, count in zip(open_, counts, strict=True) if count < floors[i]]
        if not short:
            break
        own += short
        keep -= sum(floors[i] for i in short)
        open_ = [i for i in open_ if i not in short]
    best, _ = top_k([[scores[i]] for i in own], [floors[i] for i in own])
    masks = dict(zip(open_, joint, strict=True)) | {i: mask for i, (mask,) in zip(own, best, strict=True)}
    return [masks[i] for i in range(len(scores))]


def only_allowed(score: Tensor, name: str, allowed: Mapping[str, Tensor] | None, consume: bool) -> Tensor:
    """Contiguous scores with -inf where a weight is not allowed; in the memory of `score` if `consume`."""
    score = score.contiguous()
    if allowed is None:
        return score
    if consume:
        return score.masked_fill_(allowed[name].logical_not(), float("-inf"))
    return torch.where(allowed[name], score, float("-inf"))


def too_few(keep: int, left: int, unit: str = "weights") -> str:
    """Error message for a count that the weights, or units, which are left cannot fill."""
    return f"cannot keep {keep} {unit}: only {left} are not pruned yet; ask for a higher sparsity"


def cannot_keep(name: str, shortage: str) -> str:
    """Error message for a matrix that lacks weights in the places that its pattern needs."""
    return f"{name} cannot keep its share: {shortage}; ask for a higher sparsity, or let pruned weights return"
