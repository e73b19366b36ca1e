"""Find the checkpoints of a run."""

import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .state import STATE_FILE


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the complete checkpoint with the most steps in an output folder, or None.

    Folders without the trainer's state or without the pruning state are skipped: they are not ours, or incomplete.
    """
    checkpoints = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and (path / STATE_FILE).is_file() and (path / TRAINER_STATE_NAME).is_file():
            checkpoints[int(step)] = str(path)
    return checkpoints[max(checkpoints)] if checkpoints else None
