"""Soft methods that train one number a unit: Gumbel's logits, and the scores of movement."""

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..masking.base import Pattern
from ..masking.maskset import MaskSet, diverged
from .base import ScoreOf
from .hard import FindWeights
from .soft import SoftMethod

NEVER = -1e4  # the number of a unit that was pruned before the run
_LEAST = -4.0  # the standardized logarithm of a zero that is not pruned
_SAME = 1e-3  # standard deviations of logarithms below this are rounding: all weights are of one size


class LearnedUnits(SoftMethod):
    """Trains one number for every unit of the pattern; the units with the largest ones are kept.

    Args:
        pattern: its units have one number each. Its scope says how the scores of a criterion are made comparable, and
            which units compete: those of a matrix for "layer", else all.
        sparsity: the target.
        first: where all numbers start.
        prior: added to `first` as many times as the standardized logarithm of the magnitude, or of the score.
        rate: learning rate of the numbers.
    """

    apart: ClassVar[bool] = False  # logarithms of magnitudes are standardized in each matrix, not over all together
    prefix: ClassVar[str]  # of the numbers in a checkpoint
    called: ClassVar[str]  # in messages: "the ... matrix of"

    def __init__(
        self,
        find_weights: FindWeights,
        report: Callable[[dict[str, float]], None],
        pattern: Pattern,
        sparsity: float,
        first: float,
        prior: float,
        rate: float,
        scored: bool,
        fits: bool,
        keep_zeros: bool,
    ) -> None:
        # Learned numbers are comparable as they are, so that only the scores of a criterion are balanced.
        learned = pattern.scoped("global") if pattern.scope == "balanced" else pattern
        super().__init__(find_weights, report, learned, sparsity, scored, fits, keep_zeros)
        self._scoring, self._first, self._prior, self._rate = pattern, first, prior, rate
        self._learned: dict[str, nn.Parameter] = {}
        self._started = False  # whether they have their values for the weights that the soft phase began with

    # -- what is trained ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def attach(self, model: nn.Module) -> None:
        """Find the model's weights; in a new model, make their numbers."""
        before = self.weights
        super().attach(model)
        if any(before.get(name) is not weight for name, weight in self.weights.items()):
            self.renew(model)

    def renew(self, model: nn.Module) -> None:
        """Make the numbers of a new model."""
        self._started = False
        for name, weight in self.weights.items():
            shape = self._pattern.unit_shape(weight.shape)
            numbers = torch.full(shape, self._first, dtype=torch.float32, device=weight.device)
            self._learned[name] = nn.Parameter(numbers)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the numbers of an earlier run."""
        self._started = False
        for numbers in self._learned.values():
            numbers.fill_(self._first)
            self.optimizer.state.pop(numbers, None)

    def parameter_groups(self) -> list[dict]:
        """The numbers, with a learning rate of their own."""
        return [{"params": list(self._learned.values()), "lr": self._rate, "weight_decay": 0.0}]

    def remember(self) -> Callable[[], None]:
        """Return a function that gives this object its present state back; numbers change only where they start."""
        bring_back, started = super().remember(), self._started

        def bring_numbers_back() -> None:
            bring_back()
            for numbers in () if started else self._learned.values():
                numbers.data.fill_(self._first)

        return bring_numbers_back

    def finite(self) -> dict[str, Tensor]:
        """The numbers by name; a ValueError if training has diverged."""
        for name, numbers in self._learned.items():
            if not bool(torch.isfinite(torch.stack(numbers.data.aminmax())).all()):
                raise ValueError(diverged(f"the {self.called} matrix of {name}", f" at step {self._step}"))
        return {name: numbers.data for name, numbers in self._learned.items()}

    def best(self, numbers: dict[str, Tensor]) -> MaskSet:
        """The masks of the best numbers, at the target."""
        return self.spread(self._pattern.unit_masks(numbers, self._sparsity, self._allowed_units()))

    def spread(self, units: dict[str, Tensor]) -> MaskSet:
        """Masks of weights from masks of units."""
        return MaskSet({name: self._pattern.spread(mask, self.weights[name]) for name, mask in units.items()})

    # -- where they start --------------------------------------------------------------------------------------------

    def begin_from(self, score_of: ScoreOf, degree: float) -> dict[str, Tensor]:
        """Start from the scores of a criterion, made comparable."""
        pattern = self._scoring
        comparable = ((n, pattern.comparable(pattern.unit_scores(score_of(n)), consume=True)) for n in self.weights)
        self._begin_at(comparable, apart=False)
        return {name: numbers.data for name, numbers in self._learned.items()}

    @torch.no_grad()
    def start(self) -> None:
        """Once, start from the magnitudes that the soft phase begins with, unless scores have done it."""
        if not self._started:
            sizes = ((n, self._pattern.unit_sizes(self._weight(n).abs().float())) for n in self.weights)
            self._begin_at(sizes, self.apart)

    def _begin_at(self, sizes: Iterable[tuple[str, Tensor]], apart: bool) -> None:
        """Start by `sizes` (>= 0), which may be changed; what is pruned gets no chance."""
        self._started = True
        if self._prior:
            logs = {n: standardized_logs([(n, s)])[n] for n, s in sizes} if apart else standardized_logs(sizes)
            for name, log in logs.items():
                numbers = self._learned[name].data
                numbers.add_(log.view_as(numbers), alpha=self._prior)
        for name, allowed in (self._allowed_units() or {}).items():
            self._learned[name].data.masked_fill_(~allowed, NEVER)

    # -- resume ------------------------------------------------------------------------------------------------------

    def on_optimizer_step(self) -> None:
        """Set the pruned weights to zero and clear the gradients of the numbers."""
        super().on_optimizer_step()
        for numbers in self._learned.values():
            numbers.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights and the numbers; empty outside the soft phase."""
        state = super().state_dict()
        return state | {self.prefix + n: numbers.data for n, numbers in self._learned.items()} if state else state

    @torch.no_grad()
    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """Restore a checkpoint with its numbers."""
        super().load_state_dict(masks, state, step)
        for name, numbers in self._learned.items() if state else ():
            numbers.copy_(state[self.prefix + name])
        self._started = bool(state)


def standardized_logs(sizes: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The logarithms of sizes (>= 0), in place, with mean 0 and standard deviation 1 over all; -4 for zeros."""
    logs, count, total, squares = {}, 0, 0.0, 0.0
    for name, size in sizes:
        log = logs[name] = size.log_()
        some = log[log.isfinite()].double()
        count, total, squares = count + some.numel(), total + float(some.sum()), squares + float(some @ some)
    mean = total / max(count, 1)
    deviation = max(squares / max(count, 1) - mean**2, _SAME**2) ** 0.5
    return {name: log.sub_(mean).div_(deviation).masked_fill_(log.isinf(), _LEAST) for name, log in logs.items()}
