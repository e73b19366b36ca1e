"""Small groups of weights along the input axis, each of which keeps its own best."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Groups of `size` consecutive weights along the input axis, each of which keeps its `keep` best."""

    keep: int
    size: int

    def view(self, tensor: Tensor) -> Tensor:
        """A view of a weight, its scores or its mask whose last axis runs through one group.

        The input axis is the reduction axis of the GEMM: the last one of a linear weight, the channels (axis 1) of a
        convolution.
        """
        last = tensor.movedim(1, -1) if tensor.dim() > 2 else tensor
        return last.unflatten(-1, (-1, self.size))

    def best(self, scores: Tensor) -> Tensor:
        """Boolean mask, contiguous, of every group's `keep` largest scores; among equal ones the lower index stays."""
        groups = self.view(scores.contiguous())
        mask = _best_of_groups(groups.reshape(-1, self.size), self.keep).view(groups.shape).flatten(-2)
        return mask.movedim(-1, 1).contiguous() if mask.dim() > 2 else mask

    def middle(self, values: Tensor) -> Tensor:
        """The value half-way between what a group keeps and what it drops; it broadcasts over `view`."""
        largest_dropped, smallest_kept = group_boundaries(self.view(values), self.keep)
        return largest_dropped.add(smallest_kept).mul_(0.5).unsqueeze(-1)

    def exceeded(self, mask: Tensor) -> bool:
        """Whether any group of a boolean mask keeps more than `keep`."""
        return bool((self.view(mask).sum(-1) > self.keep).any())

    def short(self, allowed: Tensor) -> int:
        """How many groups have fewer than `keep` weights that are allowed (boolean)."""
        if bool(allowed.all()):
            return 0
        return int(torch.count_nonzero(self.view(allowed).sum(-1) < self.keep))

    def after(self, share: float) -> Groups | None:
        """The groups when `share` of their zeros, in [0, 1], are in place; None while that is no whole weight."""
        dropped = round(share * (self.size - self.keep))
        return replace(self, keep=self.size - dropped) if dropped else None


def group_boundaries(groups: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The largest entry that is dropped and the smallest of the `keep` that stay, in every group (the last axis).

    Returns:
        two tensors of the groups' shape without its last axis.
    """
    size = groups.shape[-1]
    ordered = [column.contiguous() for column in groups.unbind(-1)]
    # An odd-even sorting network: whole columns at a time, no index moves. The groups are small.
    for round_ in range(size):
        for i in range(round_ % 2, size - 1, 2):
            low, high = torch.minimum(ordered[i], ordered[i + 1]), torch.maximum(ordered[i], ordered[i + 1])
            ordered[i], ordered[i + 1] = low, high
    return ordered[size - keep - 1], ordered[size - keep]


def _best_of_groups(groups: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest per row of `groups` (rows, size), ties by index."""
    size = groups.shape[1]
    if (keep, size) == (2, 4):
        return _two_of_four(groups)
    if size > 16:  # pairwise comparisons grow with the square of the group
        best = groups.argsort(dim=1, descending=True, stable=True)[:, :keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
    columns = [column.contiguous() for column in groups.unbind(1)]
    beaten = [torch.zeros(groups.shape[0], dtype=torch.int8, device=groups.device) for _ in columns]
    for i in range(size):
        for j in range(i + 1, size):
            later_wins = columns[j] > columns[i]
            beaten[i] += later_wins
            beaten[j] += later_wins.logical_not_()
    return torch.stack([count < keep for count in beaten], dim=1)


def _two_of_four(groups: Tensor) -> Tensor:
    """`_best_of_groups` for two of four, in four comparisons instead of six, which take most of the time.

    The better of each pair stays, unless the worse of one pair beats the better of the other.
    """
    a, b, c, d = (column.contiguous() for column in groups.unbind(1))
    b_better, d_better = b > a, d > c
    first_pair = torch.minimum(a, b) >= torch.maximum(c, d)
    second_pair = torch.minimum(c, d) > torch.maximum(a, b)
    mask = torch.empty_like(groups, dtype=torch.bool)
    for i, better, both, none in ((0, b_better, first_pair, second_pair), (2, d_better, second_pair, first_pair)):
        mask[:, i + 1] = better.logical_and(none.logical_not()).logical_or_(both)
        mask[:, i] = better.logical_or_(none).logical_not_().logical_or_(both)
    return mask
