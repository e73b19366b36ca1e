"""What the trainer asks of a pruning method."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..masking.maskset import MaskSet
from ..masking.schedule import LevelPlan


class Method(Protocol):
    """A method is attached to the unwrapped model and told of every optimizer step; all state is keyed by step and
    seed."""

    masks: MaskSet

    def attach(self, model: nn.Module) -> None:
        """Bind to the model's parameters by name. Idempotent: `create_optimizer` may run more than once."""

    def parameter_groups(self) -> list[dict]:
        """Optimizer groups of what is trained beside the model's own parameters; asked for after `attach`."""

    def begin(self, plan: LevelPlan, optimizer: torch.optim.Optimizer) -> None:
        """Training starts (or goes on, after `load_state_dict`) with this plan and optimizer."""

    def on_step_begin(self, step: int) -> None:
        """Before optimizer step `step` (from 0) sees its first micro-batch: advance the sparsity here."""

    def before_clipping(self) -> None:
        """After the last backward of a step, before gradients are clipped."""

    def on_optimizer_step(self) -> None:
        """Right after the optimizer changed the weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs beyond the model's own weights and the masks."""

    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """The inverse, for a checkpoint written after `step` optimizer steps."""

    def baked_state_dict(self) -> dict[str, Tensor] | None:
        """Plain-key, exactly sparse weights to save, or None where the model itself already is that."""

    def finalize(self) -> None:
        """Training is over: leave the model plain and exactly sparse."""
