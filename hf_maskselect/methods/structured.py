"""Training of a model whose shape becomes smaller: there are no zeros, so masks keep every weight."""

import torch
from torch import Tensor, nn

from ..masking.maskset import MaskSet
from ..masking.schedule import LevelPlan
from .base import Method
from .hard import FindWeights


class Structured(Method):
    """Follows the levels of a run that removes layers, neurons and heads. It changes no weight.

    Args:
        find_weights: returns the weights of a model that masks could cover, by name.
    """

    shards = None

    def __init__(self, find_weights: FindWeights) -> None:
        self._find_weights = find_weights
        self.weights: dict[str, nn.Parameter] = {}
        self.aside: dict[str, Tensor] = {}
        self.level = -1
        self.plan = LevelPlan((), (), 0)  # until `begin`

    def attach(self, model: nn.Module) -> None:
        """Find the model's weights."""
        self.weights = self._find_weights(model)

    def begin(self, plan: LevelPlan, optimizer: torch.optim.Optimizer) -> None:
        """Start to train by `plan`. The first level may have started: it comes before the optimizer is made."""
        self.plan = plan

    @property
    def masks(self) -> MaskSet:
        """Masks that keep every weight."""
        return MaskSet.ones(self.weights)

    def set_masks(self, masks: MaskSet) -> None:
        """Check that masks fit; they keep every weight."""
        masks.check_fits(self.weights)

    def level_due(self, step: int) -> int | None:
        """The level that begins at `step`, if it is not in force yet."""
        level = self.plan.level_at(step)
        return level if level > self.level else None

    def start_level(self, level: int, masks: MaskSet) -> None:
        """Note that the model has the shape of `level`."""
        self.level = level

    def state_dict(self) -> dict[str, Tensor]:
        """The level in force."""
        return {"level": torch.tensor(self.level)}

    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """Go on at the level of a checkpoint."""
        self.set_masks(masks)
        self.level = int(state["level"])

    def before_clipping(self) -> None:
        """Do nothing: every weight is trained."""

    def on_optimizer_step(self) -> None:
        """Do nothing: every weight is kept."""

    def finalize(self) -> None:
        """Do nothing: the model is plain."""
