"""The gap in a ranking where a mask is cut: between the largest pruned value and the smallest kept one."""

import torch
from torch import Tensor

from ..masking.ranking import kth_largest

# Half-width of the bracket, as a share of the entries, so that sorting those inside costs no more than finding them.
# It is doubled where values or ranks move faster.
_MARGIN, _WIDEST = 1 / 400, 1 / 32


class Boundary:
    """Finds the two neighbouring values at a cut: always exact, and cheap while the values drift.

    One pass collects the values in the bracket of the last call, and only these few are sorted. At the first call, or
    where the answer has left the bracket, the whole ranking is searched. The answer never depends on the bracket.
    """

    def __init__(self) -> None:
        self._bracket: tuple[Tensor, Tensor] | None = None
        self._below, self._margin = 0, _MARGIN

    @torch.no_grad()
    def find(self, values: Tensor, below: int) -> tuple[Tensor, Tensor]:
        """The `below`-th and the next value in ascending order, as 0-dim tensors.

        Args:
            values: any shape, without NaN.
            below: how many values lie below the cut, in 1 .. numel - 1.

        Raises:
            ValueError: `below` is out of range.
        """
        total = values.numel()
        if not 1 <= below < total:
            raise ValueError(f"below must lie in 1..{total - 1} (one value on each side), got {below}")
        flat, moved, self._below = values.flatten(), below - self._below, below
        if self._bracket is not None:
            low, high = self._bracket
            above_low = flat >= low
            rank = below - (total - int(torch.count_nonzero(above_low))) - 1  # of the answer, inside the bracket
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
        """Set the next bracket around the answer if the rank moves on as it did, by the density of values there."""
        margin = max(int(total * self._margin), 1)
        first, last = max(rank - margin, 0), min(rank + margin, inside.numel() - 1)
        pace = (inside[last] - inside[first]) / max(last - first, 1)  # change of the value per rank
        ahead = moved if abs(moved) <= 4 * margin else 0
        self._bracket = inside[rank] + pace * (ahead - margin), inside[rank + 1] + pace * (ahead + margin)
