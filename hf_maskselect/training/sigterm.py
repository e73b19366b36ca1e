"""A last checkpoint where the machine is taken away (`enable_jit_checkpoint`)."""

from __future__ import annotations

from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from ..utils.processes import Processes


class CheckpointTogether(JITCheckpointCallback):
    """Answers a SIGTERM at the end of an optimizer step, and on all ranks at the same one.

    The callback that it takes the place of writes wherever it notices the signal: in the middle of a step, when the
    random states have moved on, and on each rank by itself, while others wait in another collective.
    """

    def __init__(self, noticed: JITCheckpointCallback, ranks: Processes) -> None:
        super().__init__()
        self.trainer, self.jit_manager, self._ranks = noticed.trainer, noticed.jit_manager, ranks

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.jit_manager.is_checkpoint_requested = False  # of a signal that came after the last run had stopped

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Not yet."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Not yet."""

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """The last step of the epoch has answered."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if any(self._ranks.gather(self.jit_manager.is_checkpoint_requested)):
            self.jit_manager.is_checkpoint_requested = False
            control.should_save = control.should_training_stop = True
