"""The interface of a pattern, and the masks of every pattern that prunes whole units of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .allocation import cannot_keep, kept_count
from .groups import Groups
from .ranking import top_k_masks
from .schedule import cubic_levels
from .sharded import Shards

Tensors = Mapping[str, Tensor]
Masks = dict[str, Tensor]
# For each whole matrix the number of its weights, and of those that are allowed; None where that is not known
Counts = tuple[Sequence[int], Sequence[int]] | None


class Pattern:
    """Where kept weights may lie in a matrix, and how many of them there are.

    The weights of a unit are kept or pruned together. Every matrix keeps the same share of its units, those with the
    largest L2 norm of scores. A new pattern is a frozen dataclass with `unit_axes`, and `view` if a unit is only a
    part of a row or column. It overrides the rest where it counts in another way.

    Attributes:
        scope: which weights compete: "layer" (those of one matrix), "global" or "balanced" (those of all matrices).
        scopes: the scopes that the pattern can have.
        searchable: whether votes and logits of single weights can make its masks.
        row_local: whether units lie within a row, so that masks can be made where every process holds only its rows.
        transposable: whether the pattern fits weights that are stored transposed, as in `Conv1D`.
        unit: the word for its units, in the plural.
    """

    scope: str = "layer"
    scopes: ClassVar[tuple[str, ...]] = ("layer",)
    searchable: ClassVar[bool] = False
    row_local: ClassVar[bool] = False
    transposable: ClassVar[bool] = False
    unit: ClassVar[str] = "units"

    def unit_axes(self, dim: int) -> tuple[int, ...]:
        """The axes of a `view` with `dim` axes that run through one unit; none if a unit is one weight."""
        return ()

    def view(self, tensor: Tensor) -> Tensor:
        """A view, never a copy, of a weight, its scores or its mask that has axes of its own for a unit."""
        return tensor

    # -- what it allows ----------------------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float | None:
        """The only target sparsity that the pattern can have; None if there are others."""
        return None

    @property
    def groups(self) -> Groups | None:
        """The small groups that each keep the same count; None if weights compete within a whole matrix."""
        return None

    def scoped(self, scope: str) -> Pattern:
        """The same pattern with another scope, if it can have it."""
        return self

    def comparable(self, score: Tensor, consume: bool = False) -> Tensor:
        """The scores of one matrix as they enter a joint ranking; changed in place if `consume`."""
        return score

    def levels(self, sparsity: float, num_levels: int | None = None) -> list[float]:
        """Sparsity levels up to `sparsity`, spaced by `cubic_levels`; 4 of them by default."""
        return cubic_levels(sparsity, num_levels or 4)

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError if a weight of this shape cannot have the pattern."""

    def check_sparsity(self, sparsity: float) -> None:
        """Raise a ValueError if the pattern cannot have this sparsity at any level."""

    # -- counts ------------------------------------------------------------------------------------------------------

    def unit_size(self, shape: Sequence[int]) -> int:
        """Number of weights of one unit, in a weight of this shape."""
        view = self.view(torch.empty(shape, device="meta"))
        return math.prod(view.shape[axis] for axis in self.unit_axes(view.dim()))

    def kept_units(self, units: int, sparsity: float) -> int:
        """How many of a matrix's `units` stay at `sparsity`."""
        return kept_count(units, sparsity)

    def keeps(self, shapes: Iterable[Sequence[int]], sparsity: float) -> int:
        """How many weights of matrices of these shapes stay at `sparsity`: the exact count."""
        sizes = ((math.prod(shape), self.unit_size(shape)) for shape in shapes)
        return sum(self.kept_units(total // size, sparsity) * size for total, size in sizes)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether a boolean mask keeps weights only where the pattern allows it, whatever their number."""
        view = self.view(mask)
        axes = self.unit_axes(view.dim())
        return not axes or torch.equal(view.all(axes), view.any(axes))

    def shortage(self, allowed: Tensor, sparsity: float) -> str:
        """Words for why one matrix cannot keep its count at `sparsity` among the `allowed` weights (boolean).

        Empty if it can, or if other matrices may keep more instead.
        """
        whole = self.whole_units(allowed)
        return self._too_few(int(torch.count_nonzero(whole)), self.kept_units(whole.numel(), sparsity))

    def _too_few(self, whole: int, keep: int) -> str:
        if whole >= keep:
            return ""
        return f"{keep} of its {self.unit} must stay whole, and only {whole} have no pruned weight"

    # -- masks -------------------------------------------------------------------------------------------------------

    def masks(self, scores: Tensors, sparsity: float, allowed: Tensors | None = None, consume: bool = False) -> Masks:
        """Boolean masks (True = kept) by name, with the exact count of zeros.

        Args:
            scores: float32, shaped like the weights; larger is more important.
            sparsity: fraction of zeros, in [0, 1).
            allowed: boolean masks of an earlier level, whose pruned weights stay pruned. Too few are a ValueError.
            consume: whether the scores may be overwritten, which saves a copy of them.
        """
        masks = {}
        for name, score in scores.items():
            if allowed is not None and (short := self.shortage(allowed[name], sparsity)):
                raise ValueError(cannot_keep(name, short))
            norms = self._norms(score, None if allowed is None else allowed[name])
            masks[name] = self.spread(top_k_masks([norms], self.kept_units(norms.numel(), sparsity))[0], score)
        return masks

    def sharded_masks(
        self, scores: Tensors, sparsity: float, shards: Shards, allowed: Tensors | None = None, counts: Counts = None
    ) -> Masks:
        """`masks` where every process holds only its rows: boolean masks shaped like the local scores.

        They are the rows of the masks of the whole to the bit. Only "balanced" may differ in a few weights, since its
        means are summed over the processes. `counts` saves a sum. All processes pass the same names in the same order,
        and raise a ValueError together: as `masks` does, or if a score is NaN, or if a unit reaches over several rows.
        """
        if not self.row_local:
            raise ValueError(f"{self} prunes across rows, which lie on several processes: train with DDP instead")
        norms = [self._norms(score, None if allowed is None else allowed[name]) for name, score in scores.items()]
        # A unit that is not whole has the norm -inf.
        whole = [int(torch.count_nonzero(norm != float("-inf"))) for norm in norms]
        sums = shards.sums([*(norm.numel() for norm in norms), *whole])
        keeps = [self.kept_units(count, sparsity) for count in sums[: len(norms)]]
        for name, count, keep in zip(scores, sums[len(norms) :], keeps, strict=True):
            if short := self._too_few(count, keep):
                raise ValueError(cannot_keep(name, short))
        kept, _ = shards.top_k_masks([[norm] for norm in norms], keeps)
        return {name: self.spread(mask, score) for (name, score), (mask,) in zip(scores.items(), kept, strict=True)}

    # -- units -------------------------------------------------------------------------------------------------------

    def _norms(self, score: Tensor, allowed: Tensor | None) -> Tensor:
        """The L2 norm of every unit's scores, shaped like `unit_sizes`; -inf if a weight of it is not allowed."""
        view = self.view(score := score.contiguous())
        axes = self.unit_axes(view.dim())
        norms = torch.linalg.vector_norm(view, dim=axes).flatten() if axes else score.clone()
        return norms if allowed is None else norms.masked_fill_(~self.whole_units(allowed), float("-inf"))

    def unit_sizes(self, sizes: Tensor) -> Tensor:
        """Root mean square of every unit of `sizes` (float32, >= 0), flat; `sizes` itself if a unit is one weight."""
        view = self.view(sizes := sizes.contiguous())  # the order of a sum decides its last bits
        axes = self.unit_axes(view.dim())
        return view.square().mean(axes).sqrt_().flatten() if axes else sizes

    def whole_units(self, allowed: Tensor) -> Tensor:
        """Which units have no weight outside `allowed`: boolean, shaped like `unit_sizes`."""
        view = self.view(allowed)
        axes = self.unit_axes(view.dim())
        return view.all(axes).flatten() if axes else allowed

    def spread(self, units: Tensor, like: Tensor) -> Tensor:
        """The mask of a weight shaped as `like` from the mask of its units, which is shaped like `unit_sizes`."""
        if units.shape == like.shape:
            return units
        mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
        view = self.view(mask)
        axes = self.unit_axes(view.dim())
        view.copy_(units.view([1 if axis in axes else size for axis, size in enumerate(view.shape)]))
        return mask
