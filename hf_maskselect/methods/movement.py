"""Movement pruning: "Adaptive Sparsity by Fine-Tuning" (Sanh, Wolf, Rush; NeurIPS 2020; arXiv 2005.07683).

One score per weight is trained beside the weights. At every optimizer step the weights with the largest scores are
kept, as many as the ramp allows (there is none after a refit), and the model computes with `weight * mask`. The
gradient passes the mask straight through to all scores, `dL/dscore = dL/d(weight * mask) * weight`: the score of a
weight rises while training moves the weight away from zero, whether it is kept or not. The weights that are kept train
as usual.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..masking.base import Pattern
from ..masking.maskset import MaskSet
from .hard import FindWeights
from .learned import LearnedUnits


class Movement(LearnedUnits):
    """Learned scores beside the weights; the best of an exact count are kept.

    Args:
        pattern: its units have one score each, whose gradient is the sum of those of its weights. Its scope says how
            the scores of a criterion are made comparable, and which units compete: those of a matrix for "layer", else
            all; or it has groups, each of which keeps its best, from all weights down to the target along the ramp.
        sparsity: the target.
        rate: learning rate of the scores.
        prior: the scores start at this many times the standardized logarithms of magnitudes, or of the scores of a
            criterion; 0 is the paper, where the first cuts go by index.
        scored: whether they start from the scores of a criterion.
        fits: as in `SoftMethod`.
    """

    prefix, called = "scores.", "score"

    def __init__(
        self,
        find_weights: FindWeights,
        report: Callable[[dict[str, float]], None],
        pattern: Pattern,
        sparsity: float,
        rate: float,
        prior: float,
        scored: bool = False,
        fits: bool = False,
        keep_zeros: bool = True,
    ) -> None:
        super().__init__(find_weights, report, pattern, sparsity, 0.0, prior, rate, scored, fits, keep_zeros)
        self._kept: dict[str, Tensor] = {}  # masks of units, for one step

    # -- one step ----------------------------------------------------------------------------------------------------

    def prepare(self, step: int) -> None:
        """Choose what the step keeps."""
        self._kept = self._units_now()

    def _units_now(self) -> dict[str, Tensor]:
        """Boolean masks of the units that are kept at this point of the ramp. Below the target they may have zeros."""
        self.start()
        scores, ramp, groups = self.finite(), self.plan.ramp_at(self._step), self._pattern.groups
        if ramp == 1:
            return self._pattern.unit_masks(scores, self._sparsity, self._allowed_units())
        if groups is None:
            return self._pattern.unit_masks(scores, ramp * self._sparsity)
        now = groups.after(ramp)
        if now is None:
            return {name: torch.ones_like(t, dtype=torch.bool) for name, t in scores.items()}
        return {name: now.best(t) for name, t in scores.items()}

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """The weight times its mask."""
        return weight * self._pattern.spread(self._kept[name], weight).to(weight.dtype)

    def carry(self, name: str, weight: Tensor, grad: Tensor, effective: Tensor) -> None:
        """Compute the gradient of the scores, and leave that of the kept weights."""
        self._learned[name].grad = self._sums(grad.float() * weight.float())
        grad.mul_(self._pattern.spread(self._kept.pop(name), weight).to(grad.dtype))

    def _sums(self, of_weights: Tensor) -> Tensor:
        """The sum over every unit, shaped as the scores are."""
        view = self._pattern.view(of_weights.contiguous())
        axes = self._pattern.unit_axes(view.dim())
        # In double precision, where the order of the addends hardly matters.
        return view.sum(axes, dtype=torch.float64).float().flatten() if axes else of_weights.contiguous()

    # -- masks -------------------------------------------------------------------------------------------------------

    def hard_masks(self) -> MaskSet:
        """The masks of the step."""
        return self.spread(self._units_now())

    def candidate(self, ratio: float | None, seed: int) -> MaskSet:
        """The best scores at the target; there are no random neighbours."""
        assert ratio is None
        self.start()
        return self.best(self.finite())
