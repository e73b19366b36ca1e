"""Hard masks, fixed between levels.

They come from one criterion (such as magnitude or taylor, or a user's `score_fn`), or are the chosen candidate of
"Randomized Pruning Mask Generation and Selection" (Li, Gao, Lei, Xu; EMNLP Findings 2023; arXiv 2310.13183).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..masking.dtensors import close_gaps_, gathered, in_strides_of, local_rows, reshard, sharded_like, shards_of
from ..masking.maskset import MaskSet, pack_bits, unpack_bits
from ..masking.schedule import LevelPlan
from ..masking.sharded import Shards
from .base import Method

FindWeights = Callable[[nn.Module], dict[str, nn.Parameter]]


class HardMethod(Method):
    """Keeps pruned weights at exactly zero while the model trains, without touching its modules.

    The gradients of pruned weights are set to zero before clipping, and the pruned weights after every step. The masks
    are held once, in the weights' own dtype (multiplying by a boolean mask is 6x slower), and not at all before the
    first cut. Weights that FSDP2 has sharded have masks that are sharded alike.

    Args:
        find_weights: returns the prunable weights of a model by name.
        keep_zeros: whether weights that are zero in the model at the start count as pruned. Zeros of a frozen weight
            always do, since nothing could change them.
    """

    def __init__(self, find_weights: FindWeights, keep_zeros: bool = True) -> None:
        self._find_weights, self._keep_zeros = find_weights, keep_zeros
        self.weights: dict[str, nn.Parameter] = {}
        self.shards: Shards | None = None
        self.aside: dict[str, Tensor] = {}
        self._keep: dict[str, Tensor] = {}  # empty if every weight is kept
        self._steps_done = 0
        self.level = -1
        self._clears_moments = False  # whether a level has started since the last step began
        self.plan = LevelPlan((), (), 0)  # until `begin`

    def attach(self, model: nn.Module) -> None:
        """Find the model's weights; in a new model, also its zeros."""
        reshard(model)
        before, self.weights = self.weights, self._find_weights(model)
        for weight in self.weights.values():
            close_gaps_(weight)
        self.shards = shards_of(self.weights)
        if any(before.get(name) is not weight for name, weight in self.weights.items()):
            self._keep = self._zeros_of_the_start()
        if self.shards is None:
            self._keep = {name: keep.to(self.weights[name]) for name, keep in self._keep.items()}

    def _zeros_of_the_start(self) -> dict[str, Tensor]:
        """Masks of the zeros that stay; empty if there are none, as in a dense model."""
        stay = {name: weight for name, weight in self.weights.items() if self._keep_zeros or not weight.requires_grad}
        rows = [local_rows(weight) for weight in stay.values()]
        zeros = sum(local.numel() - int(torch.count_nonzero(local)) for local in rows)
        if not (zeros if self.shards is None else self.shards.sums([zeros])[0]):
            return {}
        return {
            name: (weight != 0).to(weight.dtype) if name in stay else torch.ones_like(weight, requires_grad=False)
            for name, weight in self.weights.items()
        }

    def begin(self, plan: LevelPlan, optimizer: torch.optim.Optimizer) -> None:
        """Start to train by `plan`."""
        self.plan, self.optimizer = plan, optimizer
        # A checkpoint written at the end of a level belongs to it: the next cut comes with the next step.
        self.level = plan.level_at(self._steps_done - 1)
        self._steps_done = 0

    @property
    def masks(self) -> MaskSet:
        """The masks in force, with all rows on every process."""
        if not self._keep:
            return MaskSet.ones(self.weights)
        return MaskSet({name: gathered(keep.bool()) for name, keep in self._keep.items()})

    def set_masks(self, masks: MaskSet) -> None:
        """Put masks in force and set the pruned weights to zero, without a copy of the earlier masks."""
        masks.check_fits(self.weights)
        for name, weight in self.weights.items():
            if name in self._keep:
                self._keep[name].copy_(sharded_like(masks[name], weight))
            else:
                self._keep[name] = in_strides_of(weight, sharded_like(masks[name], weight).to(weight.dtype))
        self.on_optimizer_step()  # sets the pruned weights to zero
        with torch.no_grad():
            for weight in self.weights.values():
                weight.add_(0.0)  # -0.0 becomes 0.0 and stays so: equal numbers, but only one of them compresses

    def level_due(self, step: int) -> int | None:
        """The level that begins at `step`, if it is not in force yet."""
        level = self.plan.level_at(step)
        return None if level == self.level else level

    def start_level(self, level: int, masks: MaskSet) -> None:
        """Put the masks of `level` in force."""
        self.set_masks(masks)
        self.level, self._clears_moments = level, True

    def remember(self) -> Callable[[], None]:
        """Return a function that gives this object its present masks and state back. Costs a bit per weight."""
        bring_back = super().remember()
        kept = {name: pack_bits(local_rows(keep) != 0) for name, keep in self._keep.items()}

        def bring_masks_back() -> None:
            bring_back()
            for name, bits in kept.items():
                rows = local_rows(self._keep[name])
                rows.copy_(unpack_bits(bits, rows.shape))

        return bring_masks_back

    def on_step_begin(self, step: int) -> None:
        """Clear the moments of pruned weights after the start of a level: they would change these at every step.

        Only here, since a start that fails is undone, and the moments need no copy for that.
        """
        if not self._clears_moments:
            return
        for name, weight in self.weights.items():
            for moment in self.optimizer.state.get(weight, {}).values():
                if isinstance(moment, Tensor) and moment.shape == weight.shape:
                    moment.mul_(self._keep[name].to(moment.dtype))
        self._clears_moments = False

    @torch.no_grad()
    def before_clipping(self) -> None:
        """Set the gradients of pruned weights to zero."""
        for name, keep in self._keep.items():
            if (grad := self.weights[name].grad) is not None:
                grad.mul_(keep)

    @torch.no_grad()
    def on_optimizer_step(self) -> None:
        """Set the pruned weights to zero."""
        for name, keep in self._keep.items():
            self.weights[name].mul_(keep)

    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """Put the masks of a checkpoint in force."""
        if self._keep or masks.kept < masks.total:  # masks that keep all are not worth their memory
            self.set_masks(masks)
        self._steps_done = step

    def finalize(self) -> None:
        """Set the pruned weights to zero once more."""
        self.on_optimizer_step()
