"""The interface between the trainer and a pruning method."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..masking.maskset import MaskSet
from ..masking.schedule import LevelPlan
from ..masking.sharded import Shards

ScoreOf = Callable[[str], Tensor]  # name of a weight -> its scores


class Method(Protocol):
    """A pruning method: it keeps masks in force while the unwrapped model trains.

    The caller chooses the masks. Before every optimizer step it asks `level_due`. Where a level is due it calls
    `prepare_level`, chooses the masks, and passes them to `start_level`. Then it calls `on_step_begin`, and later in
    the same step `before_clipping` and `on_optimizer_step`. What a method does depends only on the step and its seed,
    so a resumed run continues as if it had never stopped.

    Attributes:
        weights: the prunable parameters by name; empty before `attach`.
        level: the index of the level in force; -1 before the first.
        shards: the processes that hold the rows of the weights; None where each holds all of them.
        aside: what the weights hold otherwise, while the model has its `baked_state_dict`; empty at other times.
    """

    weights: dict[str, nn.Parameter]
    level: int
    shards: Shards | None
    aside: dict[str, Tensor]

    @property
    def masks(self) -> MaskSet:
        """The hard masks in force, or those that the soft masks would become now. All rows, on every process."""

    @property
    def fixed_masks(self) -> MaskSet:
        """The masks of what can never change again: those in force, or in a soft phase those that it began with."""
        return self.masks

    def attach(self, model: nn.Module) -> None:
        """Find the model's prunable parameters. It may be called again with the same model, which changes nothing."""

    def restore_trained(self) -> None:
        """Give the model its trained weights back, if a step was interrupted."""
        return None

    def parameter_groups(self) -> list[dict]:
        """Optimizer groups of the parameters that the method adds to the model's own. Call `attach` first."""
        return []

    def begin(self, plan: LevelPlan, optimizer: torch.optim.Optimizer) -> None:
        """Start to train by `plan`, or continue after `load_state_dict`."""

    def soft_phase_due(self, step: int) -> bool:
        """Whether a soft phase begins at optimizer step `step`, which `take_scores` or `take_fit` prepare."""
        return False

    def take_scores(self, score_of: ScoreOf, degree: float) -> dict[str, str]:
        """Begin a soft phase from the scores of a criterion.

        `score_of` returns the scores of the local rows of one weight, finite, float32 and free to be changed. `degree`
        is that of the criterion. Returns digests of what was made of them, by name; empty where weights are sharded.
        """
        return {}

    def take_fit(self, before: Mapping[str, Tensor], masks: MaskSet) -> None:
        """Begin a soft phase from a model that was cut by `masks` and refitted; `before` are its weights before."""
        return None

    def level_due(self, step: int) -> int | None:
        """The level whose masks must be chosen before optimizer step `step` (from 0); None if the level stays."""

    def prepare_level(self) -> None:
        """Bring the weights into the state in which the masks of a due level are chosen."""
        return None

    def start_level(self, level: int, masks: MaskSet) -> None:
        """Put the masks of `level` in force. The next `on_step_begin` clears the moments of the weights they prune."""

    def remember(self) -> Callable[[], None]:
        """Return a function that gives this object its present state back, once. The model's weights are not in it.

        Dictionaries are copied, other attributes only noted: a subclass adds what it changes in place.
        """
        attributes = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}
        return lambda: vars(self).update(attributes)

    def set_masks(self, masks: MaskSet) -> None:
        """Put masks in force and set the pruned weights to zero; a ValueError if the masks do not fit."""

    def candidate(self, ratio: float | None, seed: int) -> MaskSet | None:
        """Masks at the target sparsity that the method has learned; None where a criterion makes the masks.

        They are the deterministic ones where `ratio` is None, else random ones by that sampling ratio and `seed`.
        """
        return None

    def targets(self) -> Mapping[str, Tensor]:
        """The weights, by name, whose outputs a refit aims at; empty for those that the cut began with."""
        return {}

    def on_step_begin(self, step: int) -> None:
        """Run before the first micro-batch of optimizer step `step`."""
        return None

    def before_clipping(self) -> None:
        """Run after the last backward pass of a step, before the gradients are clipped."""

    def on_optimizer_step(self) -> None:
        """Run right after the optimizer has changed the weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint needs besides the model's weights and the masks."""
        return {}

    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """Restore the masks and the `state_dict` of a checkpoint written after `step` optimizer steps."""

    def baked_state_dict(self) -> dict[str, Tensor] | None:
        """Exactly sparse weights to save, under the model's names; None if the model holds them already."""
        return None

    def finalize(self) -> None:
        """End the training: leave the model plain and exactly sparse."""
