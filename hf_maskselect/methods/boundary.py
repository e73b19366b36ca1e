"""The gap in a ranking where a mask is cut: between the largest value that falls and the smallest that stays."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking.ranking import kth_largest

# Half-width of the bracket, as a share of the entries: sorting what lies inside should cost no more than the pass that
# finds it. It is doubled where values or ranks turn out to move faster.
_MARGIN, _WIDEST = 1 / 400, 1 / 32


class Boundary:
    """The two neighbouring values between which a rank falls, exact at every call and cheap where values drift.

    The bracket left by the last call is counted in one pass; only the few values inside are sorted. Where the answer
    has left the bracket (or at the first call), the search starts afresh. The answer never depends on the bracket.
    """

    def __init__(self) -> None:
        self._bracket: tuple[Tensor, Tensor] | None = None
        self._below, self._margin = 0, _MARGIN

    @torch.no_grad()
    def find(self, values: Tensor, below: int) -> tuple[Tensor, Tensor]:
        """The `below`-th and the next value in ascending order, as 0-dim tensors.

        Args:
            values: contiguous, any shape, without NaN.
            below: how many fall, in 1 .. numel - 1.

        Raises:
            ValueError: `below` is out of range.
        """
        total = values.numel()
        if not 1 <= below < total:
            raise ValueError(f"below must lie in 1..{total - 1} (one value on each side), got {below}")
        flat, moved, self._below = values.view(-1), below - self._below, below
        if self._bracket is not None:
            low, high = self._bracket
            above_low = flat >= low
            rank = below - (total - int(torch.count_nonzero(above_low))) - 1  # of the answer, among those inside
            inside = flat[above_low.logical_and_(flat <= high)]
            if 0 <= rank and rank + 1 < inside.numel():
                inside = inside.sort().values
                self._center(inside, rank, moved, total)
                return inside[rank], inside[rank + 1]
            self._margin = min(2 * self._margin, _WIDEST)
        largest_below, smallest_above = kth_largest([flat], total - below + 1), kth_largest([flat], total - below)
        margin = max(int(total * self._margin), 1)
        ranks = (max(below - margin, 1), min(below + margin, total))
        low, high = (kth_largest([flat], total - rank + 1) for rank in ranks)
        self._bracket = low, high
        return largest_below, smallest_above

    def _center(self, inside: Tensor, rank: int, moved: int, total: int) -> None:
        """Lay the next bracket around where the answer will be if the rank moves on as it did, at the density of the
        values around it."""
        margin = max(int(total * self._margin), 1)
        first, last = max(rank - margin, 0), min(rank + margin, inside.numel() - 1)
        pace = (inside[last] - inside[first]) / max(last - first, 1)  # of the values, per rank
        ahead = moved if abs(moved) <= 4 * margin else 0
        self._bracket = inside[rank] + pace * (ahead - margin), inside[rank + 1] + pace * (ahead + margin)
