"""PDP: "Parameter-free Differentiable Pruning is All You Need" (Cho, Adya, Naik; NeurIPS 2023; arXiv 2305.11203).

Every weight trains, through `w sigmoid((w^2 - t^2) / tau)`; there is nothing else to train. How many weights
each matrix will lose is fixed when the soft phase begins (in the paper by one ranking of all, after a dense warm-up);
the counts rise linearly, and t lies half-way between the largest magnitude that falls and the smallest that stays,
taken anew from the weights at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..masking.dtensors import of_parts, whole
from ..masking.maskset import MaskSet, diverged
from ..masking.patterns import NM, Channel, Unstructured, grouped
from ..masking.ranking import top_k_masks
from ..masking.scores import CRITERIA
from ..masking.votes import number_of_draws, rank_by_votes_
from .boundary import Boundary
from .hard import FindWeights
from .pdp_mask import group_boundaries, row_squares, soft_gradient_, soft_row_gradient_, soft_row_weight, soft_weight
from .soft import SoftMethod

_ZEROS = "zeros."  # prefix of the fixed counts in a checkpoint


class Pdp(SoftMethod):
    """Soft masks without parameters.

    Args:
        pattern: `Unstructured` (its scope decides the ranking that fixes the counts; with "global", the paper's, the
            floor is the cap that leaves no matrix empty), `NM` (t inside each group, rising from 0) or `Channel` (one
            mask value a row, from its norm).
        sparsity: the target.
        tau: width of the soft band in squared weight units.
    """

    def __init__(
        self,
        find_weights: FindWeights,
        report: Callable[[Mapping[str, float]], None],
        pattern: Unstructured | NM | Channel,
        sparsity: float,
        tau: float,
        keep_zeros: bool = True,
    ) -> None:
        super().__init__(find_weights, report, keep_zeros)
        self._pattern, self._sparsity, self._tau = pattern, sparsity, tau
        # What each matrix will lose, in weights (in rows for channels); fixed when the soft phase begins.
        self._zeros: dict[str, int] = {}
        self._boundaries: dict[str, Boundary] = {}
        self._thresholds: dict[str, Tensor | float | None] = {}  # None: nothing falls

    def reset(self) -> None:
        self._zeros, self._boundaries, self._thresholds = {}, {}, {}

    def _ranked(self, weight: Tensor) -> Tensor:
        """What is compared with t: magnitudes, for channels the root mean square of each row."""
        wide = weight.abs().float()
        return row_squares(wide).sqrt_().view(-1) if isinstance(self._pattern, Channel) else wide

    def _magnitudes(self) -> dict[str, Tensor]:
        found = {name: self._weight(name).abs().float() for name in self.weights}
        for name, magnitudes in found.items():
            if magnitudes.numel() and not bool(torch.isfinite(magnitudes.max())):
                raise ValueError(self._diverged(name))
        return found

    def _diverged(self, name: str) -> str:
        return diverged(name, f" at step {self._step}")

    def prepare(self, step: int) -> None:
        if not self._zeros:
            masks = self._pattern.masks(self._magnitudes(), self._sparsity, self.alive(), consume=True)
            if isinstance(self._pattern, Channel):
                masks = {name: mask.flatten(1)[:, 0] for name, mask in masks.items()}
            self._zeros = {name: mask.numel() - int(torch.count_nonzero(mask)) for name, mask in masks.items()}
            self._boundaries = {name: Boundary() for name in masks}

    def effective(self, name: str, weight: Tensor) -> Tensor:
        threshold = self._thresholds[name] = self._threshold(name, weight)
        if threshold is None:
            return weight
        if isinstance(self._pattern, Channel):
            return soft_row_weight(weight, threshold, self._tau)
        if isinstance(self._pattern, Unstructured):
            return soft_weight(weight, threshold, self._tau)
        found = torch.empty_like(weight)
        self._groups(found).copy_(soft_weight(self._groups(weight), threshold, self._tau))
        return found

    def carry(self, name: str, weight: Tensor, grad: Tensor, effective: Tensor) -> None:
        threshold = self._thresholds.pop(name)
        if isinstance(self._pattern, Channel) and threshold is not None:
            soft_row_gradient_(grad, weight, threshold, self._tau)
        elif threshold is not None:
            soft_gradient_(self._groups(grad), self._groups(weight), threshold, self._tau)

    def _groups(self, tensor: Tensor) -> Tensor:
        """Shaped so that a threshold broadcasts: one row a group for N:M."""
        return grouped(tensor, self._pattern.m) if isinstance(self._pattern, NM) else tensor

    def _falling(self, name: str) -> int:
        """How many weights of a matrix are pruned at this step of the ramp."""
        return round(self.plan.ramp_at(self._step) * self._zeros[name])

    def _threshold(self, name: str, weight: Tensor) -> Tensor | float | None:
        """t: a number, or one value a group of N:M as a column; None where nothing falls yet."""
        if isinstance(self._pattern, NM):
            falls, stays = group_boundaries(self._groups(weight.abs().float()), self._pattern.n)
            return falls.add(stays).mul_(0.5 * self.plan.ramp_at(self._step)).unsqueeze(-1)
        zeros, magnitudes = self._falling(name), self._ranked(weight)
        if zeros == 0:
            return None
        if zeros == magnitudes.numel():
            return float("inf")
        try:
            falls, stays = self._boundaries[name].find(magnitudes, zeros)
        except ValueError as error:
            raise ValueError(self._diverged(name)) from error
        return 0.5 * (falls + stays)

    def hard_masks(self) -> MaskSet:
        self.prepare(self._step)
        if not isinstance(self._pattern, NM):
            return self._cut(self._magnitudes(), {name: self._falling(name) for name in self.weights})
        magnitudes = self._magnitudes()
        if self.plan.ramp_at(self._step) == 1:
            return self._of_all_ranks(self._pattern.masks(magnitudes, self._sparsity, self.alive()))
        masks = {}
        for name, size in magnitudes.items():
            masks[name] = torch.empty_like(size, dtype=torch.bool)
            self._groups(masks[name]).copy_(self._groups(size) >= self._threshold(name, size))
        return self._of_all_ranks(masks)

    def _of_all_ranks(self, masks: Mapping[str, Tensor]) -> MaskSet:
        return MaskSet({name: whole(of_parts(mask, self.weights[name])) for name, mask in masks.items()})

    def candidate(self, ratio: float | None, seed: int) -> MaskSet:
        self.prepare(self._step)
        scores = self._magnitudes()
        if ratio is not None:
            generator = torch.Generator(device=next(iter(scores.values())).device).manual_seed(seed)
            for name, score in scores.items():
                zeros = self._zeros[name]
                draws = number_of_draws(zeros, ratio, matrices=1)
                rank_by_votes_([score], score.numel() - zeros, draws, CRITERIA["magnitude"].vote_exponent, generator)
        if isinstance(self._pattern, NM):
            return self._of_all_ranks(self._pattern.masks(scores, self._sparsity, self.alive(), consume=True))
        return self._cut(scores, self._zeros)

    def _cut(self, scores: dict[str, Tensor], zeros: dict[str, int]) -> MaskSet:
        masks, alive = {}, self.alive()
        for name, score in scores.items():
            ranked = self._ranked(score) if isinstance(self._pattern, Channel) else score
            if alive is not None:  # of channels: rows that are whole
                living = alive[name].flatten(1).all(1) if isinstance(self._pattern, Channel) else alive[name]
                ranked = ranked.masked_fill(~living, float("-inf"))
            mask = top_k_masks([ranked], ranked.numel() - zeros[name])[0]
            if isinstance(self._pattern, Channel):
                mask = mask.view(-1, *[1] * (score.dim() - 1)).expand_as(score).contiguous()
            masks[name] = mask
        return MaskSet(masks)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        return state | {_ZEROS + name: torch.tensor(count) for name, count in self._zeros.items()} if state else state

    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        super().load_state_dict(masks, state, step)
        self._zeros = {name: int(state[_ZEROS + name]) for name in self.weights if _ZEROS + name in state}
        self._boundaries = {name: Boundary() for name in self._zeros}
