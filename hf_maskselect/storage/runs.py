"""Find the checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .state import STATE_FILE


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The whole checkpoint of the most steps in an output folder; None where there is none.

    A killed run leaves no half-written one under such a name, but a folder that another hand began may lie there.
    """
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and (path / STATE_FILE).is_file() and (path / TRAINER_STATE_NAME).is_file():
            found[int(step)] = str(path)
    return found[max(found)] if found else None
