"""What the differentiable methods share: soft masks while training, the exact hard mask at the end."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..masking.dtensors import exchange, like, of_parts, part, squared_norm, whole
from ..masking.maskset import MaskSet, pack_bits, unpack_bits
from ..masking.schedule import LevelPlan
from .hard import FindWeights, HardMethod

_ALIVE = "alive."  # prefix of the masks in force below the soft ones, packed: the zeros that the run began with
_DENSE = "dense."  # prefix of the trained weights in a checkpoint, whose model file holds the baked ones


class SoftMethod(HardMethod):
    """Trains under effective weights until the plan's level begins, and under that level's hard mask from there on.

    For the length of one optimizer step the modules hold the effective weights, so whatever reads a weight (autocast,
    activation checkpointing, DDP, `torch.compile`, a layer shared between depths) sees them; nothing is registered and
    every name stays. Before clipping the trained weights return to their place and the gradients are carried over by
    the chain rule, once a step however many micro-batches were accumulated. Between steps the model holds the trained
    weights (of sharded ones each rank its rows); evaluation and saving look through `baked_state_dict`.

    Args:
        report: called with what is worth logging when the mask hardens.
    """

    def __init__(
        self,
        find_weights: FindWeights,
        report: Callable[[Mapping[str, float]], None],
        keep_zeros: bool = True,
    ) -> None:
        super().__init__(find_weights, keep_zeros)
        self._report = report
        self._trained: dict[str, Tensor] = {}  # what waits while the effective weights are in its place
        self._step = -1  # the last step begun
        self._hardened = False
        self._resumed = False

    # -- for each method to fill in ----------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, step: int) -> None:
        """Whatever the step needs before effective weights can be computed."""

    @abstractmethod
    def effective(self, name: str, weight: Tensor) -> Tensor:
        """What the model computes with in place of `weight` in this step; not `weight` changed in place."""

    @abstractmethod
    def carry(self, name: str, weight: Tensor, grad: Tensor, effective: Tensor) -> None:
        """`grad` is the gradient with respect to `effective`: make of it, in place, the gradients of what is
        trained."""

    @abstractmethod
    def hard_masks(self) -> MaskSet:
        """The deterministic masks at this point of the run."""

    @abstractmethod
    def candidate(self, ratio: float | None, seed: int) -> MaskSet:
        """Masks at the target sparsity: the deterministic ones where `ratio` is None, else a random neighbour."""

    def reset(self) -> None:
        """Forget what an earlier run learned; called before every run that is not resumed inside its soft phase."""

    def folded(self, name: str, weight: Tensor) -> Tensor:
        """The weight as the hardened model has it, before its mask."""
        return weight

    # -- one optimizer step ------------------------------------------------------------------------------------------

    def begin(self, plan: LevelPlan, optimizer: torch.optim.Optimizer) -> None:
        self.put_back()
        self._step = self._steps_done - 1
        super().begin(plan, optimizer)
        self._hardened = self.level >= 0
        if not self._resumed:
            self.reset()
        self._resumed = False

    def put_back(self) -> None:
        """The trained weights return to their place. A step may end before its gradients are clipped: leftover
        micro-batches of an epoch without length, a callback that stops training, an interruption."""
        for name, rows in self._trained.items():
            exchange(self.weights[name], rows)
        self._trained.clear()

    def attach(self, model: nn.Module) -> None:
        known = self.weights
        super().attach(model)
        if any(known.get(name) is not weight for name, weight in self.weights.items()):
            self._hardened, self._trained = False, {}

    @property
    def soft(self) -> bool:
        """Whether soft masks are in force."""
        return not self._hardened and self.plan is not None and self.plan.ramp_at(self._step) > 0

    def prepare_level(self) -> None:
        self.put_back()
        if not self._hardened:
            self._harden(self.candidate(None, 0))

    def on_step_begin(self, step: int) -> None:
        self.put_back()
        if self._hardened:
            return
        self._step = step
        if self.soft:
            self.prepare(step)
            for name, weight in self.weights.items():
                self._trained[name] = exchange(weight, self.effective(name, part(weight.detach())))

    @torch.no_grad()
    def before_clipping(self) -> None:
        super().before_clipping()
        for name in list(self._trained):
            weight = self.weights[name]
            effective = exchange(weight, self._trained.pop(name))
            if weight.grad is not None:
                self.carry(name, part(weight.detach()), part(weight.grad), effective)

    # -- leaving the soft phase --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _harden(self, masks: MaskSet) -> None:
        """From here on the weights are those of the hard model, still unmasked. masks: what they are compared with."""
        if self.soft:
            self._report({"soft_hard_gap": self.gap(masks)})
        for name, weight in self.weights.items():
            rows = part(weight.detach())
            rows.copy_(self.folded(name, rows))
        self._hardened = True

    @torch.no_grad()
    def gap(self, masks: MaskSet) -> float:
        """What hardening changes: `|soft - hard| / |hard|` between the effective and the hard weights, over all of
        them together."""
        self.prepare(self._step)
        distance, norm = 0.0, 0.0
        for name, weight in self.weights.items():
            rows = part(weight.detach())
            hard = self.folded(name, rows) * part(like(masks[name], weight))
            distance += squared_norm(self.effective(name, rows) - hard, weight)
            norm += squared_norm(hard, weight)
        return (distance / norm) ** 0.5 if norm else 0.0

    def finalize(self) -> None:
        self.put_back()
        if not self._hardened:
            if self.plan.ramp_at(self._step) < 1:
                warnings.warn(
                    f"training ended after {self._step + 1} steps, before the soft masks had reached their target: "
                    "the rest is cut at once",
                    stacklevel=2,
                )
            masks = self.candidate(None, 0)
            self._harden(masks)
            self.set_masks(masks)
        super().finalize()

    # -- what is read and written between steps ----------------------------------------------------------------------

    def _weight(self, name: str) -> Tensor:
        """The trained weight (of a sharded one the rows of this rank), also where a step was interrupted half-way."""
        return self._trained[name] if name in self._trained else part(self.weights[name].detach())

    @property
    def masks(self) -> MaskSet:
        """The hard masks in force, or those that the soft masks amount to among what lives."""
        if not self.soft:
            return super().masks
        found = self.hard_masks()
        if not self._keep:
            return found
        return MaskSet({name: mask & whole(self._keep[name].bool()) for name, mask in found.items()})

    def alive(self) -> dict[str, Tensor] | None:
        """Boolean masks (of this rank's rows) of what had not died before the soft phase; None where nothing had."""
        return {name: part(keep).bool() for name, keep in self._keep.items()} or None

    @torch.no_grad()
    def baked_state_dict(self) -> dict[str, Tensor] | None:
        if not self.soft:
            return None
        baked = {}
        for name, mask in self.hard_masks().items():
            weight = self.weights[name]
            baked[name] = of_parts(self.folded(name, self._weight(name)) * part(like(mask, weight)), weight)
        return baked

    def state_dict(self) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        zeros = {_ALIVE + name: pack_bits(whole(keep != 0)) for name, keep in self._keep.items()}
        weights = self.weights.items()
        return zeros | {_DENSE + name: whole(of_parts(self._weight(name), weight)) for name, weight in weights}

    @torch.no_grad()
    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        self._trained.clear()  # of a run that was interrupted inside a step; the weights have been loaded since
        self._resumed = bool(state)
        if state:
            for name, weight in self.weights.items():
                weight.copy_(like(state[_DENSE + name], weight))
            self._keep, self._steps_done = {}, step
            for name, weight in self.weights.items():
                if _ALIVE + name in state:
                    alive = unpack_bits(state[_ALIVE + name], weight.shape)
                    self._keep[name] = like(alive, weight).to(weight.dtype)
        else:
            super().load_state_dict(masks, state, step)
