"""The interface of a pattern, and the masks of every pattern that prunes whole units of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .allocation import cannot_keep, kept_count, only_allowed
from .groups import Groups
from .ranking import top_k_masks
from .schedule import cubic_levels
from .sharded import Shards

Tensors = Mapping[str, Tensor]
Masks = dict[str, Tensor]
# For each whole matrix the number of its units, and of those that are allowed; None where that is not known
Counts = tuple[Sequence[int], Sequence[int]] | None


def counted(units: Tensors, allowed: Tensors | None, shards: Shards | None = None) -> tuple[list[int], list[int]]:
    """The number of units of each matrix, and of those that are allowed; with shards summed over the processes."""
    sizes = [scores.numel() for scores in units.values()]
    room = sizes if allowed is None else [int(torch.count_nonzero(allowed[name])) for name in units]
    if shards is None:
        return sizes, room
    sums = shards.sums([*sizes, *room])
    return sums[: len(sizes)], sums[len(sizes) :]


class Pattern:
    """Where kept weights may lie in a matrix, and how many of them there are.

    The weights of a unit are kept or pruned together. Every matrix keeps the same share of its units, those with the
    largest L2 norm of scores. A new pattern is a frozen dataclass with `unit_axes`, and `view` if a unit is only a
    part of a row or column. It overrides the rest where it counts in another way.

    Masks are made in three steps: `unit_scores` gives every unit a score, `unit_masks` chooses among the units, and
    `spread` turns the choice into a mask of weights.

    Attributes:
        scope: which weights compete: "layer" (those of one matrix), "global" or "balanced" (those of all matrices).
        scopes: the scopes that the pattern can have.
        searchable: whether votes and logits of its units can make its masks. The score of a unit is then the sum of
            its weights' scores.
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

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the `unit_scores` of a weight of this shape."""
        return tuple(self.unit_scores(torch.empty(shape, device="meta")).shape)

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
        units = self._units(scores)
        chosen = self.unit_masks(units, sparsity, self._whole(allowed), consume)
        return {name: self.spread(chosen[name], score) for name, score in scores.items()}

    def unit_masks(
        self, units: Tensors, sparsity: float, allowed: Tensors | None = None, consume: bool = False
    ) -> Masks:
        """Choose among units: `masks` from the `unit_scores` of every matrix, and the `whole_units` of `allowed`.

        Returns boolean masks shaped like the units' scores.
        """
        masks = {}
        for name, scores in units.items():
            keep = self.kept_units(scores.numel(), sparsity)
            if allowed is not None:
                if short := self._too_few(int(torch.count_nonzero(allowed[name])), keep):
                    raise ValueError(cannot_keep(name, short))
                scores = only_allowed(scores, name, allowed, consume)
            masks[name] = top_k_masks([scores], keep)[0]
        return masks

    def sharded_masks(
        self, scores: Tensors, sparsity: float, shards: Shards, allowed: Tensors | None = None, counts: Counts = None
    ) -> Masks:
        """`masks` where every process holds only its rows: boolean masks shaped like the local scores.

        They are the rows of the masks of the whole to the bit. Only "balanced" may differ in a few weights, since its
        means are summed over the processes. `counts`, of units, saves a sum. All processes pass the same names in the
        same order, and raise a ValueError together: as `masks` does, or if a score is NaN, or if a unit reaches over
        several rows.
        """
        if not self.row_local:
            raise ValueError(f"{self} prunes across rows, which lie on several processes: train with DDP instead")
        units = self._units(scores)
        chosen = self.sharded_unit_masks(units, sparsity, shards, self._whole(allowed), counts)
        return {name: self.spread(chosen[name], score) for name, score in scores.items()}

    def sharded_unit_masks(
        self, units: Tensors, sparsity: float, shards: Shards, allowed: Tensors | None = None, counts: Counts = None
    ) -> Masks:
        """`unit_masks` where every process holds only its units."""
        sizes, room = counted(units, allowed, shards) if counts is None else counts
        keeps = [self.kept_units(size, sparsity) for size in sizes]
        for name, count, keep in zip(units, room, keeps, strict=True):
            if short := self._too_few(count, keep):
                raise ValueError(cannot_keep(name, short))
        ranked = [only_allowed(scores, name, allowed, consume=False) for name, scores in units.items()]
        kept, _ = shards.top_k_masks([[scores] for scores in ranked], keeps)
        return {name: mask for name, (mask,) in zip(units, kept, strict=True)}

    # -- units -------------------------------------------------------------------------------------------------------

    def unit_scores(self, score: Tensor) -> Tensor:
        """One score a unit, float32 and flat; `score` itself if a unit is one weight."""
        view = self.view(score := score.contiguous())
        axes = self.unit_axes(view.dim())
        return torch.linalg.vector_norm(view, dim=axes).flatten() if axes else score

    def _units(self, scores: Tensors) -> dict[str, Tensor]:
        for name, score in scores.items():
            self.check(name, score.shape)
        return {name: self.unit_scores(score) for name, score in scores.items()}

    def _whole(self, allowed: Tensors | None) -> Tensors | None:
        return None if allowed is None else {name: self.whole_units(mask) for name, mask in allowed.items()}

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

    def in_whole_units(self, masks: Tensors) -> int:
        """How many weights of boolean masks lie in units that have no weight outside of their mask."""
        kept = (
            int(torch.count_nonzero(self.whole_units(mask))) * self.unit_size(mask.shape) for mask in masks.values()
        )
        return sum(kept)

    def spread(self, units: Tensor, like: Tensor) -> Tensor:
        """Give every weight, shaped as `like`, the value or the mask of its unit; `units` are shaped as `unit_scores`.

        Returns `units` itself if a unit is one weight.
        """
        if units.shape == like.shape:
            return units
        mask = torch.empty(like.shape, dtype=units.dtype, device=like.device)
        view = self.view(mask)
        axes = self.unit_axes(view.dim())
        view.copy_(units.view([1 if axis in axes else size for axis, size in enumerate(view.shape)]))
        return mask
