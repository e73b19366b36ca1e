"""Hard masks, fixed between levels: one criterion (magnitude, fisher, taylor, a user's score_fn) or the chosen
candidate of "Randomized Pruning Mask Generation and Selection" (Li, Gao, Lei, Xu; EMNLP Findings 2023; arXiv
2310.13183)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..masking.dtensors import like, part, reshard, shards_of, whole
from ..masking.maskset import MaskSet
from ..masking.schedule import LevelPlan
from ..masking.sharded import Shards

FindWeights = Callable[[nn.Module], dict[str, nn.Parameter]]


class HardMethod:
    """Keeps pruned weights at exactly zero while the model trains, without touching its modules.

    The gradients of pruned weights are set to zero before clipping, and the pruned weights after every step. The masks
    are held once, in the weights' own dtype (multiplying by a boolean mask is 6x slower), and not at all before the
    first cut. Weights that FSDP2 has sharded have masks that are sharded alike.

    Args:
        find_weights: model -> its prunable weights.
        keep_zeros: whether weights that are zero in the model to begin with are pruned ones; those of a frozen weight,
            which nothing could bring back, are in any case.
    """

    def __init__(self, find_weights: FindWeights, keep_zeros: bool = True) -> None:
        self._find_weights, self._keep_zeros = find_weights, keep_zeros
        self.weights: dict[str, nn.Parameter] = {}
        self.shards: Shards | None = None
        self._keep: dict[str, Tensor] = {}  # empty: everything is kept
        self._steps_done = 0
        self.level = -1
        self.plan: LevelPlan | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(self, model: nn.Module) -> None:
        reshard(model)
        known, self.weights = self.weights, self._find_weights(model)
        self.shards = shards_of(self.weights)
        if any(known.get(name) is not weight for name, weight in self.weights.items()):  # the first, or a new model
            self._keep = self._zeros_of_the_start()
        if self.shards is None:
            self._keep = {name: keep.to(self.weights[name]) for name, keep in self._keep.items()}

    def detach(self) -> None:
        """Forget the model; its zeros are read anew when it, or another, is attached."""
        self.weights = {}

    def _zeros_of_the_start(self) -> dict[str, Tensor]:
        """Masks of the zeros that stay; none where there are none, as in a dense model."""
        stay = {name: weight for name, weight in self.weights.items() if self._keep_zeros or not weight.requires_grad}
        dead = sum(part(weight).numel() - int(torch.count_nonzero(part(weight))) for weight in stay.values())
        if not (dead if self.shards is None else self.shards.sums([dead])[0]):
            return {}
        return {
            name: (weight != 0).to(weight.dtype) if name in stay else torch.ones_like(weight, requires_grad=False)
            for name, weight in self.weights.items()
        }

    def begin(self, plan: LevelPlan, optimizer: torch.optim.Optimizer) -> None:
        self.plan, self.optimizer = plan, optimizer
        # A checkpoint written at the end of a level belongs to it: the next cut comes with the next step.
        self.level = plan.level_at(self._steps_done - 1)
        self._steps_done = 0

    @property
    def masks(self) -> MaskSet:
        """The masks in force, whole on every rank."""
        if not self._keep:
            return MaskSet.ones(self.weights)
        return MaskSet({name: whole(keep.bool()) for name, keep in self._keep.items()})

    def set_masks(self, masks: MaskSet) -> None:
        """Put masks in force and zero what they remove; no copy of the old ones is kept."""
        masks.check_fits(self.weights)
        for name, weight in self.weights.items():
            if name in self._keep:
                self._keep[name].copy_(like(masks[name], weight))
            else:
                self._keep[name] = like(masks[name], weight).to(weight.dtype)
        self.on_optimizer_step()  # zeroes the weights
        with torch.no_grad():
            for weight in self.weights.values():
                weight.add_(0.0)  # -0.0 becomes 0.0 and stays so: equal numbers, but only one of them compresses

    def level_due(self, step: int) -> int | None:
        level = self.plan.level_at(step)
        return None if level == self.level else level

    def prepare_level(self) -> None:
        pass

    def start_level(self, level: int, masks: MaskSet) -> None:
        self.set_masks(masks)
        self.level = level
        self._clear_dead_moments()

    def candidate(self, ratio: float | None, seed: int) -> MaskSet | None:
        return None

    def on_step_begin(self, step: int) -> None:
        pass

    @torch.no_grad()
    def before_clipping(self) -> None:
        for name, keep in self._keep.items():
            if self.weights[name].grad is not None:
                self.weights[name].grad.mul_(keep)

    @torch.no_grad()
    def on_optimizer_step(self) -> None:
        for name, keep in self._keep.items():
            self.weights[name].mul_(keep)

    def _clear_dead_moments(self) -> None:
        """Momentum that points into a removed weight would push it every step: it dies with the weight."""
        for name, weight in self.weights.items():
            for moment in self.optimizer.state.get(weight, {}).values():
                if isinstance(moment, Tensor) and moment.shape == weight.shape:
                    moment.mul_(self._keep[name].to(moment.dtype))

    def parameter_groups(self) -> list[dict]:
        return []

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        if self._keep or masks.kept < masks.total:  # a mask of ones is not worth its memory
            self.set_masks(masks)
        self._steps_done = step

    def baked_state_dict(self) -> None:
        return None

    def finalize(self) -> None:
        self.on_optimizer_step()
