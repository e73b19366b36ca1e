"""PDP: "Parameter-free Differentiable Pruning is All You Need" (Cho, Adya, Naik; NeurIPS 2023; arXiv 2305.11203).

Every weight trains through `w sigmoid((w^2 - t^2) / tau)`; nothing else is trained. When the soft phase begins, the
number of weights that each matrix will lose is fixed (in the paper by one ranking of all, after a dense warm-up). The
number pruned rises linearly to it. At every step t is computed from the weights: half-way between the largest pruned
and the smallest kept magnitude.

Ours: where the soft phase begins from the scores of a criterion, every magnitude is multiplied by a fixed factor, so
that the products rank as the scores do. Counts, thresholds, masks and gradients are then those of the products. Where
the model is refitted first, the soft phase is at its target from the first step, and the factors make up for what the
refit has changed.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..masking.base import Pattern
from ..masking.dtensors import from_local_rows, gathered, local_rows, sharded_like
from ..masking.maskset import MaskSet, diverged
from ..masking.ranking import top_k_masks
from ..masking.scores import CRITERIA
from ..masking.votes import number_of_draws, rank_by_votes_
from .base import ScoreOf
from .boundary import Boundary
from .factors import factors, refitted_factors
from .hard import FindWeights
from .pdp_mask import soft_gradient_, soft_weight
from .soft import SoftMethod

_ZEROS, _FACTORS = "zeros.", "factors."  # prefixes of the fixed counts, and of the factors, in a checkpoint
_NARROWEST = 1e-24  # relative width where t is 0, which must not divide


class Pdp(SoftMethod):
    """Soft masks without parameters.

    Args:
        pattern: the weights of a unit share one mask value, from their root mean square. Its scope decides the ranking
            that fixes the counts (in the paper "global"). If it has groups, each has its own t, which rises from 0.
        sparsity: the target.
        tau: width of the soft band, in squared weight units; None for `relative_tau`.
        relative_tau: the same in units of t^2, whatever the scale of weights and scores.
        scored: whether magnitudes get factors.
        fits: as in `SoftMethod`.
    """

    def __init__(
        self,
        find_weights: FindWeights,
        report: Callable[[dict[str, float]], None],
        pattern: Pattern,
        sparsity: float,
        tau: float | None,
        relative_tau: float = 1.0,
        scored: bool = False,
        fits: bool = False,
        keep_zeros: bool = True,
    ) -> None:
        super().__init__(find_weights, report, pattern, sparsity, scored, fits, keep_zeros)
        self._tau, self._relative_tau = tau, relative_tau
        self._factors: dict[str, Tensor] = {}  # local rows, in half precision; empty without scores and fit
        self._zeros: dict[str, int] = {}  # units that each matrix will lose, fixed when the soft phase begins
        self._boundaries: dict[str, Boundary] = {}
        self._thresholds: dict[str, Tensor | float | None] = {}  # None where nothing is pruned

    def reset(self) -> None:
        """Forget the counts, thresholds and factors of an earlier run."""
        self._zeros, self._boundaries, self._thresholds, self._factors = {}, {}, {}, {}

    def begin_from(self, score_of: ScoreOf, degree: float) -> dict[str, Tensor]:
        """Fix the counts by the scores, and make the factors by which magnitudes rank like them."""
        units, made, pattern = {}, {}, self._pattern
        for name, weight in self.weights.items():
            score = score_of(name)
            units[name] = pattern.unit_scores(score)
            comparable = pattern.comparable(units[name])
            made[name] = factors(score, comparable, local_rows(weight.detach()), pattern, degree)
        self._fix_counts(pattern.unit_masks(units, self._sparsity, self._allowed_units(), consume=True))
        self._factors = made
        return made

    @torch.no_grad()
    def take_fit(self, before: Mapping[str, Tensor], masks: MaskSet) -> None:
        """Change the factors, too, so that the fitted weights rank as they did before."""
        super().take_fit(before, masks)
        for name, weight in self.weights.items():
            factor = self._factors.get(name)
            self._factors[name] = refitted_factors(factor, before[name].to(weight), weight.detach())

    def _sizes(self, name: str, weight: Tensor) -> Tensor:
        """Magnitudes, times their factors if there are any; float32, a copy."""
        size, factor = weight.abs().float(), self._factors.get(name)
        return size if factor is None else size.mul_(factor)

    def _magnitudes(self) -> dict[str, Tensor]:
        magnitudes = {name: self._sizes(name, self._weight(name)) for name in self.weights}
        for name, size in magnitudes.items():
            if size.numel() and not bool(torch.isfinite(size.max())):
                raise ValueError(self._diverged(name))
        return magnitudes

    def _diverged(self, name: str) -> str:
        return diverged(name, f" at step {self._step}")

    def prepare(self, step: int) -> None:
        """Fix the counts by magnitude, once, unless scores have fixed them."""
        if not self._zeros:
            units = {name: self._pattern.unit_scores(size) for name, size in self._magnitudes().items()}
            self._fix_counts(self._pattern.unit_masks(units, self._sparsity, self._allowed_units(), consume=True))

    def _fix_counts(self, kept: Mapping[str, Tensor]) -> None:
        """Fix how many units each matrix will lose, by masks of the units that stay."""
        self._zeros = {name: mask.numel() - int(torch.count_nonzero(mask)) for name, mask in kept.items()}
        self._boundaries = {name: Boundary() for name in kept}

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """The weight times its soft mask."""
        threshold = self._thresholds[name] = self._threshold(name, weight)
        if threshold is None:
            return weight
        view, width = self._pattern.view(weight), self._width(threshold)
        axes, factor = self._pattern.unit_axes(view.dim()), self._factor(name)
        masked = soft_weight(view, threshold, width, axes, factor)
        if view is weight:
            return masked
        effective = torch.empty_like(weight)
        self._pattern.view(effective).copy_(masked)
        return effective

    def carry(self, name: str, weight: Tensor, grad: Tensor, effective: Tensor) -> None:
        """Multiply the gradient by the derivative of the soft mask."""
        threshold = self._thresholds.pop(name)
        if threshold is not None:
            view, width = self._pattern.view(weight), self._width(threshold)
            axes, factor = self._pattern.unit_axes(view.dim()), self._factor(name)
            soft_gradient_(self._pattern.view(grad), view, threshold, width, axes, factor)

    def _factor(self, name: str) -> Tensor | None:
        """A view of a matrix's factors, as the pattern sees them; None where there are none."""
        return self._pattern.view(self._factors[name]) if name in self._factors else None

    def _width(self, threshold: Tensor | float) -> Tensor | float:
        """Tau at a threshold."""
        if self._tau is not None:
            return self._tau
        if isinstance(threshold, float):  # infinity: the whole matrix is pruned
            return 1.0
        return threshold.square().mul_(self._relative_tau).clamp_min_(_NARROWEST)

    def _falling(self, name: str) -> int:
        """How many units of a matrix are pruned at this step of the ramp."""
        return round(self.plan.ramp_at(self._step) * self._zeros[name])

    def _threshold(self, name: str, weight: Tensor) -> Tensor | float | None:
        """Compute t: a number, or a tensor that broadcasts over the view; None where nothing is pruned yet."""
        if self._pattern.groups is not None:
            return self._pattern.groups.middle(self._sizes(name, weight)).mul_(self.plan.ramp_at(self._step))
        zeros, sizes = self._falling(name), self._pattern.unit_sizes(self._sizes(name, weight))
        if zeros == 0:
            return None
        if zeros == sizes.numel():
            return float("inf")
        try:
            largest_pruned, smallest_kept = self._boundaries[name].find(sizes, zeros)
        except ValueError as error:
            raise ValueError(self._diverged(name)) from error
        return 0.5 * (largest_pruned + smallest_kept)

    def hard_masks(self) -> MaskSet:
        """The masks that prune every unit below its t."""
        self.prepare(self._step)
        magnitudes, groups, ramp = self._magnitudes(), self._pattern.groups, self.plan.ramp_at(self._step)
        if groups is None:
            sizes = {name: self._pattern.unit_sizes(size) for name, size in magnitudes.items()}
            return self._cut(sizes, {name: self._falling(name) for name in self.weights})
        if ramp == 1:
            return self._gathered(self._pattern.masks(magnitudes, self._sparsity, self.allowed()))
        masks = {name: torch.empty_like(size, dtype=torch.bool) for name, size in magnitudes.items()}
        for name, size in magnitudes.items():
            groups.view(masks[name]).copy_(groups.view(size) >= groups.middle(size).mul_(ramp))
        return self._gathered(masks)

    def _gathered(self, masks: Mapping[str, Tensor]) -> MaskSet:
        return MaskSet({name: gathered(from_local_rows(mask, self.weights[name])) for name, mask in masks.items()})

    def candidate(self, ratio: float | None, seed: int) -> MaskSet:
        """Masks of the fixed counts, by magnitude, or by votes around it."""
        self.prepare(self._step)
        scores = {name: self._pattern.unit_sizes(size) for name, size in self._magnitudes().items()}
        if ratio is not None:
            generator = torch.Generator(device=next(iter(scores.values())).device).manual_seed(seed)
            for name, score in scores.items():
                zeros = self._zeros[name]
                draws = number_of_draws(zeros, ratio, matrices=1)
                rank_by_votes_([score], score.numel() - zeros, draws, CRITERIA["magnitude"].vote_exponent, generator)
        if self._pattern.groups is not None:
            return self._gathered(self._pattern.masks(scores, self._sparsity, self.allowed(), consume=True))
        return self._cut(scores, self._zeros)

    def _cut(self, sizes: dict[str, Tensor], zeros: dict[str, int]) -> MaskSet:
        """Masks that prune the `zeros` smallest units of every matrix."""
        masks, allowed = {}, self.allowed()
        for name, size in sizes.items():
            if allowed is not None:
                size = size.masked_fill(~self._pattern.whole_units(allowed[name]), float("-inf"))
            units = top_k_masks([size], size.numel() - zeros[name])[0]
            masks[name] = self._pattern.spread(units, self.weights[name])
        return MaskSet(masks)

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights, the fixed counts and the factors."""
        state = super().state_dict()
        if state:
            state |= {_ZEROS + name: torch.tensor(count) for name, count in self._zeros.items()}
            for name, rows in self._factors.items():
                state[_FACTORS + name] = gathered(from_local_rows(rows, self.weights[name]))
        return state

    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """Restore a checkpoint with its counts and factors."""
        super().load_state_dict(masks, state, step)
        self._factors = {
            name: local_rows(sharded_like(state[_FACTORS + name], weight))
            for name, weight in self.weights.items()
            if _FACTORS + name in state
        }
        self._zeros = {name: int(state[_ZEROS + name]) for name in self.weights if _ZEROS + name in state}
        self._boundaries = {name: Boundary() for name in self._zeros}
