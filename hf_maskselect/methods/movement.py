"""Movement pruning: "Adaptive Sparsity by Fine-Tuning" (Sanh, Wolf, Rush; NeurIPS 2020; arXiv 2005.07683).

One score per weight is trained beside the weights. At every optimizer step the weights with the largest scores are
kept, as many as the ramp allows, and the model computes with `weight * mask`. The gradient passes the mask straight
through to all scores, `dL/dscore = dL/d(weight * mask) * weight`: the score of a weight rises while training moves the
weight away from zero, whether it is kept or not. The weights that are kept train as usual.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..masking.base import Pattern
from ..masking.maskset import MaskSet, diverged
from .base import ScoreOf
from .hard import FindWeights
from .soft import SoftMethod

_SCORES = "scores."  # prefix in a checkpoint
_NEVER = -1e4  # the score of a weight that was pruned before the run
_LEAST = -4.0  # the standardized logarithm of a zero that is not pruned
_SAME = 1e-3  # standard deviations of logarithms below this are rounding: all weights are of one size


class Movement(SoftMethod):
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
        refits: as in `SoftMethod`.
    """

    def __init__(
        self,
        find_weights: FindWeights,
        report: Callable[[dict[str, float]], None],
        pattern: Pattern,
        sparsity: float,
        rate: float,
        prior: float,
        scored: bool = False,
        refits: bool = False,
        keep_zeros: bool = True,
    ) -> None:
        super().__init__(find_weights, report, scored, refits, keep_zeros)
        self._scoring = pattern  # makes the scores of a criterion comparable; movement's own are so by themselves
        self._pattern = pattern.scoped("global") if pattern.scope == "balanced" else pattern
        self._sparsity, self._rate, self._prior = sparsity, rate, prior
        self._scores: dict[str, nn.Parameter] = {}
        self._kept: dict[str, Tensor] = {}  # masks of units, for one step
        self._started = False  # whether the scores have their values for the weights that the soft phase began with

    # -- what is trained ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        """Find the model's weights; in a new model, make their scores."""
        before = self.weights
        super().attach(model)
        if all(before.get(name) is weight for name, weight in self.weights.items()):
            return
        self._scores, self._started = {}, False
        for name, weight in self.weights.items():
            shape = self._pattern.unit_shape(weight.shape)
            self._scores[name] = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=weight.device))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the scores of an earlier run."""
        self._started = False
        for scores in self._scores.values():
            scores.zero_()
            self.optimizer.state.pop(scores, None)

    def parameter_groups(self) -> list[dict]:
        """The scores, with a learning rate of their own."""
        return [{"params": list(self._scores.values()), "lr": self._rate, "weight_decay": 0.0}]

    def remember(self) -> Callable[[], None]:
        """Return a function that gives this object its present state back; scores change only where they start."""
        bring_back, started = super().remember(), self._started

        def bring_scores_back() -> None:
            bring_back()
            for scores in () if started else self._scores.values():
                scores.data.zero_()

        return bring_scores_back

    @torch.no_grad()
    def _start(self) -> None:
        """Once, set the scores by the magnitudes that the soft phase begins with, unless a criterion has set them."""
        if not self._started:
            self._begin_at({n: self._pattern.unit_sizes(self._weight(n).abs().float()) for n in self.weights})

    def begin_from(self, score_of: ScoreOf, degree: float) -> dict[str, Tensor]:
        """Set the scores by those of a criterion."""
        units = {name: self._scoring.unit_scores(score_of(name)) for name in self.weights}
        self._begin_at({name: self._scoring.comparable(unit, consume=True) for name, unit in units.items()})
        return {name: scores.data for name, scores in self._scores.items()}

    def _begin_at(self, sizes: Mapping[str, Tensor]) -> None:
        """Start the scores by `sizes` (>= 0); what is pruned gets no chance."""
        self._started = True
        if self._prior:
            self._set_to_logs(sizes)
        for name, allowed in (self._allowed_units() or {}).items():
            self._scores[name].data.masked_fill_(~allowed, _NEVER)

    def _set_to_logs(self, sizes: Mapping[str, Tensor]) -> None:
        """Set the scores to `prior` times the logarithms of `sizes` (>= 0), standardized over all matrices."""
        logs, count, total, squares = {}, 0, 0.0, 0.0
        for name, size in sizes.items():
            log = logs[name] = size.log()
            some = log[log.isfinite()].double()
            count, total, squares = count + some.numel(), total + float(some.sum()), squares + float(some @ some)
        mean = total / max(count, 1)
        deviation = max(squares / max(count, 1) - mean**2, _SAME**2) ** 0.5
        for name, log in logs.items():
            z = log.sub_(mean).div_(deviation).masked_fill_(log.isinf(), _LEAST)
            self._scores[name].data.copy_(z.view_as(self._scores[name])).mul_(self._prior)

    def _allowed_units(self) -> dict[str, Tensor] | None:
        """Boolean masks of the units without a weight that was pruned before the run; None if all are."""
        allowed = self.allowed()
        return None if allowed is None else {name: self._pattern.whole_units(mask) for name, mask in allowed.items()}

    # -- one step ----------------------------------------------------------------------------------------------------

    def prepare(self, step: int) -> None:
        """Choose what the step keeps."""
        self._kept = self._units_now()

    def _units_now(self) -> dict[str, Tensor]:
        """Boolean masks of the units that are kept at this point of the ramp. Below the target they may have zeros."""
        self._start()
        scores, ramp, groups = self._finite_scores(), self.plan.ramp_at(self._step), self._pattern.groups
        if ramp == 1:
            return self._units_at_target(scores)
        if groups is None:
            return self._pattern.unit_masks(scores, ramp * self._sparsity)
        now = groups.after(ramp)
        if now is None:
            return {name: torch.ones_like(t, dtype=torch.bool) for name, t in scores.items()}
        return {name: now.best(t) for name, t in scores.items()}

    def _units_at_target(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._pattern.unit_masks(scores, self._sparsity, self._allowed_units())

    def _finite_scores(self) -> dict[str, Tensor]:
        """The scores by name; a ValueError if training has diverged."""
        for name, scores in self._scores.items():
            if not bool(torch.isfinite(torch.stack(scores.data.aminmax())).all()):
                raise ValueError(diverged(f"the score matrix of {name}", f" at step {self._step}"))
        return {name: scores.data for name, scores in self._scores.items()}

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """The weight times its mask."""
        return weight * self._pattern.spread(self._kept[name], weight).to(weight.dtype)

    def carry(self, name: str, weight: Tensor, grad: Tensor, effective: Tensor) -> None:
        """Compute the gradient of the scores, and leave that of the kept weights."""
        self._scores[name].grad = self._sums(grad.float() * weight.float())
        grad.mul_(self._pattern.spread(self._kept.pop(name), weight).to(grad.dtype))

    def _sums(self, of_weights: Tensor) -> Tensor:
        """The sum over every unit, shaped as the scores are."""
        view = self._pattern.view(of_weights.contiguous())
        axes = self._pattern.unit_axes(view.dim())
        # In double precision, where the order of the addends hardly matters.
        return view.sum(axes, dtype=torch.float64).float().flatten() if axes else of_weights.contiguous()

    def on_optimizer_step(self) -> None:
        """Set the pruned weights to zero and clear the gradients of the scores."""
        super().on_optimizer_step()
        for scores in self._scores.values():
            scores.grad = None

    # -- masks -------------------------------------------------------------------------------------------------------

    def _spread(self, units: dict[str, Tensor]) -> MaskSet:
        return MaskSet({name: self._pattern.spread(mask, self.weights[name]) for name, mask in units.items()})

    def hard_masks(self) -> MaskSet:
        """The masks of the step."""
        return self._spread(self._units_now())

    def candidate(self, ratio: float | None, seed: int) -> MaskSet:
        """The best scores at the target; there are no random neighbours."""
        assert ratio is None
        self._start()
        return self._spread(self._units_at_target(self._finite_scores()))

    # -- resume ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights and the scores; empty outside the soft phase."""
        state = super().state_dict()
        return state | {_SCORES + name: scores.data for name, scores in self._scores.items()} if state else state

    @torch.no_grad()
    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """Restore a checkpoint with its scores."""
        super().load_state_dict(masks, state, step)
        for name, scores in self._scores.items() if state else ():
            scores.copy_(state[_SCORES + name])
        self._started = bool(state)
