"""The base of differentiable methods: soft masks while the weights train, the exact hard mask at the end."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..masking.base import Pattern
from ..masking.dtensors import from_local_rows, gathered, local_rows, sharded_like, squared_norm, swap_data
from ..masking.maskset import MaskSet, pack_bits, unpack_bits
from ..masking.schedule import LevelPlan
from ..utils.digests import weights_digest
from .base import ScoreOf
from .hard import FindWeights, HardMethod

_ALLOWED = "alive."  # prefix in a checkpoint of the packed masks of the zeros that the run began with
_DENSE = "dense."  # prefix in a checkpoint of the trained weights; its model file holds the baked ones


class SoftMethod(HardMethod):
    """Trains under effective weights in the soft phase, and from the plan's level on under its hard mask.

    In a step of the soft phase the modules hold the effective weights, so everything that reads a weight (autocast,
    activation checkpointing, DDP, `torch.compile`, a layer shared between depths) sees them. Nothing is registered and
    every name stays. Before clipping, the modules get their trained weights back, and the chain rule turns the
    gradients into those of the trained weights: once a step, however many micro-batches were accumulated. Between
    steps the model holds the trained weights; evaluation and saving use `baked_state_dict`.

    Args:
        find_weights: returns the prunable weights of a model by name.
        report: called with values to log when the mask hardens.
        pattern: what is pruned together, and the scope of the ranking.
        sparsity: the target.
        scored: whether the soft phase begins from the scores of a criterion, which `take_scores` gets. A run that ends
            before that is cut by magnitude.
        fits: whether the soft phase begins from a model that is refitted under the mask at the target.
        keep_zeros: as in `HardMethod`.
    """

    def __init__(
        self,
        find_weights: FindWeights,
        report: Callable[[dict[str, float]], None],
        pattern: Pattern,
        sparsity: float,
        scored: bool = False,
        fits: bool = False,
        keep_zeros: bool = True,
    ) -> None:
        super().__init__(find_weights, keep_zeros)
        self._report, self._pattern, self._sparsity = report, pattern, sparsity
        self._scored, self._fits = scored, fits
        self._begun = False
        self._untrained = True  # whether no optimizer step has followed since the soft phase was begun
        self._trained: dict[str, Tensor] = {}  # local rows, while the effective weights are in their place
        self._step = -1  # the last step that began
        self._hardened = False
        self._resumed = False

    # -- for each method to fill in ----------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, step: int) -> None:
        """Compute what all effective weights of the step need."""

    @abstractmethod
    def begin_from(self, score_of: ScoreOf, degree: float) -> Mapping[str, Tensor]:
        """Begin from scores, as in `take_scores`; return what was made of them, by name."""

    @abstractmethod
    def effective(self, name: str, weight: Tensor) -> Tensor:
        """The weight that the model computes with in this step; `weight` itself must not change."""

    @abstractmethod
    def carry(self, name: str, weight: Tensor, grad: Tensor, effective: Tensor) -> None:
        """Turn `grad`, with respect to `effective`, in place into the gradients of the trained parameters."""

    @abstractmethod
    def hard_masks(self) -> MaskSet:
        """The deterministic masks at this point of the run."""

    @abstractmethod
    def candidate(self, ratio: float | None, seed: int) -> MaskSet:
        """Masks at the target sparsity: the deterministic ones where `ratio` is None, else a random neighbour."""

    def reset(self) -> None:
        """Forget what an earlier run learned. Called before a run, unless it resumes inside its soft phase."""

    def folded(self, name: str, weight: Tensor) -> Tensor:
        """The weight that the hardened model has before its mask."""
        return weight

    # -- how the soft phase begins ------------------------------------------------------------------------------------

    def soft_phase_due(self, step: int) -> bool:
        """Whether the soft phase begins at `step`, from scores or a fit that are not there yet."""
        prepared = self._begun or self._hardened or not (self._scored or self._fits)
        return not prepared and self.plan.ramp_at(step) > 0

    @torch.no_grad()
    def take_scores(self, score_of: ScoreOf, degree: float) -> dict[str, str]:
        """Begin the soft phase from scores.

        Raises:
            ValueError: a score is negative, or all are zero.
        """
        self.restore_trained()
        allowed, positive = self.allowed(), 0

        def checked(name: str) -> Tensor:
            nonlocal positive
            score = score_of(name)
            if allowed is not None:
                score.masked_fill_(allowed[name].logical_not(), 0)
            if bool((score < 0).any()):
                raise ValueError(
                    f"a soft mask needs scores >= 0, but those of {name} are negative: shift them in score_fn"
                )
            positive += int(torch.count_nonzero(score))
            return score

        made = self.begin_from(checked, degree)
        if not (positive if self.shards is None else self.shards.sums([positive])[0]):
            raise ValueError(
                "all scores are zero, so they rank nothing: check that the loss depends on the weights, or use "
                "criterion='magnitude'"
            )
        self._begun = self._untrained = True
        return {} if self.shards is not None else {name: weights_digest({name: t}) for name, t in made.items()}

    @torch.no_grad()
    def take_fit(self, before: Mapping[str, Tensor], masks: MaskSet) -> None:
        """Give the pruned weights their values back, so that they can return; the kept ones are fitted without them.

        Args:
            before: the weights before the cut, by name.
            masks: those of the cut.
        """
        for name, weight in self.weights.items():
            weight.copy_(torch.where(masks[name].to(weight.device), weight, before[name].to(weight)))
        self._begun = self._untrained = True

    # -- one optimizer step ------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Find the model's weights; in a new model, start with a soft phase."""
        before = self.weights
        super().attach(model)
        if any(before.get(name) is not weight for name, weight in self.weights.items()):
            self._hardened, self._begun, self._trained = False, False, {}

    def begin(self, plan: LevelPlan, optimizer: torch.optim.Optimizer) -> None:
        """Start to train by `plan`, or continue in the soft phase of a checkpoint."""
        self.restore_trained()
        self._step = self._steps_done - 1
        super().begin(plan, optimizer)
        self._hardened = self.level >= 0
        # A run that failed before the first step of its soft phase goes on from its scores and its fit.
        if not (self._resumed or (self._begun and self._untrained)):
            self._begun = False
            self.reset()
        self._resumed = False

    def restore_trained(self) -> None:
        """Give the model its trained weights back, if a step ended before its gradients were clipped.

        That happens after the last micro-batches of an epoch without length, a callback that stops training, or an
        interruption.
        """
        for name, rows in self._trained.items():
            swap_data(self.weights[name], rows)
        self._trained.clear()

    @property
    def soft(self) -> bool:
        """Whether soft masks are in force."""
        return not self._hardened and self.plan.ramp_at(self._step) > 0

    def prepare_level(self) -> None:
        """Leave the soft phase: the model gets its trained weights back, and these become those of the hard model."""
        self.restore_trained()
        if not self._hardened:
            self._harden(self.candidate(None, 0))

    def on_step_begin(self, step: int) -> None:
        """Give the model the effective weights of the step."""
        super().on_step_begin(step)
        self.restore_trained()
        if self._hardened:
            return
        self._step = step
        if self.soft:
            self.prepare(step)
            for name, weight in self.weights.items():
                self._trained[name] = swap_data(weight, self.effective(name, local_rows(weight.detach())))

    @torch.no_grad()
    def before_clipping(self) -> None:
        """Give the model its trained weights back, with their gradients."""
        super().before_clipping()
        for name in list(self._trained):
            weight = self.weights[name]
            effective = swap_data(weight, self._trained.pop(name))
            if weight.grad is not None:
                self.carry(name, local_rows(weight.detach()), local_rows(weight.grad), effective)

    def on_optimizer_step(self) -> None:
        """Set the pruned weights to zero."""
        super().on_optimizer_step()
        self._untrained = False

    # -- leaving the soft phase --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _harden(self, masks: MaskSet) -> None:
        """Make the weights those of the hard model, still without a mask; log how far `masks` will change them."""
        if self.soft:
            self._report({"soft_hard_gap": self.gap(masks)})
        for name, weight in self.weights.items():
            rows = local_rows(weight.detach())
            rows.copy_(self.folded(name, rows))
        self._hardened = True

    @torch.no_grad()
    def gap(self, masks: MaskSet) -> float:
        """The change by hardening: `|soft - hard| / |hard|` between effective and hard weights, over all together."""
        self.prepare(self._step)
        distance, norm = 0.0, 0.0
        for name, weight in self.weights.items():
            rows = local_rows(weight.detach())
            hard = self.folded(name, rows) * local_rows(sharded_like(masks[name], weight))
            distance += squared_norm(self.effective(name, rows) - hard, weight)
            norm += squared_norm(hard, weight)
        return (distance / norm) ** 0.5 if norm else 0.0

    def finalize(self) -> None:
        """Leave the model exactly sparse; harden now if training ended in the soft phase."""
        self.restore_trained()
        if not self._hardened:
            if self.plan.ramp_at(self._step) < 1:
                warnings.warn(
                    f"training ended after {self._step + 1} steps, before the soft masks reached their target: the "
                    "rest is cut at once",
                    stacklevel=2,
                )
            masks = self.candidate(None, 0)
            self._harden(masks)
            self.set_masks(masks)
        super().finalize()

    # -- between steps -----------------------------------------------------------------------------------------------

    def _weight(self, name: str) -> Tensor:
        """The local rows of a trained weight, also where a step was interrupted half-way."""
        held = self._trained if name in self._trained else self.aside
        return held[name] if name in held else local_rows(self.weights[name].detach())

    @property
    def fixed_masks(self) -> MaskSet:
        """The hard masks in force, or in the soft phase those of the zeros that it began with."""
        return super().masks

    @property
    def masks(self) -> MaskSet:
        """The hard masks in force, or in the soft phase those that the soft masks would become now."""
        if not self.soft:
            return self.fixed_masks
        hard = self.hard_masks()
        if not self._keep:
            return hard
        return MaskSet({name: mask & gathered(self._keep[name].bool()) for name, mask in hard.items()})

    def allowed(self) -> dict[str, Tensor] | None:
        """Boolean masks, of the local rows, of the weights that were not pruned before the run; None if all."""
        return {name: local_rows(keep).bool() for name, keep in self._keep.items()} or None

    def _allowed_units(self) -> dict[str, Tensor] | None:
        """Boolean masks of the units without a weight that was pruned before the run; None if all are."""
        allowed = self.allowed()
        return None if allowed is None else {name: self._pattern.whole_units(mask) for name, mask in allowed.items()}

    @torch.no_grad()
    def baked_state_dict(self) -> dict[str, Tensor] | None:
        """The weights that the model would have if it hardened now; None outside the soft phase."""
        if not self.soft:
            return None
        baked = {}
        for name, mask in self.hard_masks().items():
            weight = self.weights[name]
            rows = self.folded(name, self._weight(name)) * local_rows(sharded_like(mask, weight))
            baked[name] = from_local_rows(rows, weight)
        return baked

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights and the zeros of the start; empty outside the soft phase."""
        if not self.soft:
            return {}
        state = {_ALLOWED + name: pack_bits(gathered(keep != 0)) for name, keep in self._keep.items()}
        for name, weight in self.weights.items():
            state[_DENSE + name] = gathered(from_local_rows(self._weight(name), weight))
        return state

    @torch.no_grad()
    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """Restore a checkpoint, in the soft phase if it has a state."""
        self._trained.clear()  # left by a run that was interrupted inside a step; the weights were loaded since
        self._resumed = bool(state)
        if not state:
            super().load_state_dict(masks, state, step)
            return
        self._keep, self._steps_done, self._begun = {}, step, True
        for name, weight in self.weights.items():
            weight.copy_(sharded_like(state[_DENSE + name], weight))
            if _ALLOWED + name in state:
                allowed = unpack_bits(state[_ALLOWED + name], weight.shape)
                self._keep[name] = sharded_like(allowed, weight).to(weight.dtype)
