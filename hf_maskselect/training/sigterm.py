"""A last checkpoint when the machine is about to be taken away (`enable_jit_checkpoint`)."""

from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from ..utils.processes import Processes


class CheckpointTogether(JITCheckpointCallback):
    """Save on SIGTERM at the end of an optimizer step, and on all ranks at the same step.

    The callback of transformers, which this one replaces, saves wherever it notices the signal: in the middle of a
    step, when the random states have moved on, and on each rank alone, while the others wait in a collective.
    """

    def __init__(self, replaced: JITCheckpointCallback, processes: Processes) -> None:
        super().__init__()
        assert replaced.jit_manager is not None  # made when the trainer was
        self.trainer, self.jit_manager, self._manager = replaced.trainer, replaced.jit_manager, replaced.jit_manager
        self._processes = processes

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Forget a signal of an earlier run."""
        self._manager.is_checkpoint_requested = False  # a signal may have come after the last run stopped

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Wait for the end of the step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Wait for the end of the step."""

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """The last step of the epoch has saved already."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Save and stop, if any rank has noticed the signal."""
        if any(self._processes.gather(self._manager.is_checkpoint_requested)):
            self._manager.is_checkpoint_requested = False
            control.should_save = control.should_training_stop = True
