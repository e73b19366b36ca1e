"""Find the checkpoints of a run, in the order of their steps, and delete old ones."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.folders import finish, remove_folder, remove_leftovers
from ..utils.reading import read_object, typed
from .state import STATE_FILE

# Types of the trainer's state as they are in JSON.
_HINTS: dict[str, Any] = {
    **get_type_hints(TrainerState),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "num_train_epochs", "num_input_tokens_seen"), float),
    "epoch": float | None,
    "log_history": list[dict[str, Any]],
    "trial_params": dict[str, Any] | None,
    "stateful_callbacks": dict[str, dict[str, Any] | list[dict[str, Any]]],
}


def checkpoints(folder: str | os.PathLike) -> dict[int, Path]:
    """Return the folders `checkpoint-STEP` of an output folder by their step, the fewest steps first."""
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isascii() and step.isdigit() and path.is_dir():
            found[int(step)] = path
    return dict(sorted(found.items()))


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the checkpoint with the most steps in an output folder, or None.

    A folder with neither the pruning state nor the trainer's state is none. One with only one of them was a checkpoint
    and has lost a file: it is returned, so that whoever resumes refuses it and does not fall back to an earlier one.
    """
    for path in reversed(checkpoints(folder).values()):
        finish(path)
        if (path / STATE_FILE).is_file() or (path / TRAINER_STATE_NAME).is_file():
            return str(path)
    return None


def rotate(folder: str | os.PathLike, limit: int | None, newest: int, best: int | None = None) -> None:
    """Delete the oldest checkpoints of an output folder, so that `limit` stay.

    The order is that of the steps, since clocks can be wrong. Checkpoints beyond the newest are of an earlier run and
    go first.

    Args:
        folder: the output folder.
        limit: number of checkpoints to keep; None or 0 keeps all.
        newest: step of the checkpoint that was written last. It stays.
        best: step of the best checkpoint, if there is one. It stays too.
    """
    remove_leftovers(Path(folder))
    if limit is None or limit <= 0:
        return
    found = checkpoints(folder)
    others = [step for step in found if step not in (newest, best)]
    others.sort(key=lambda step: (step < newest, step))
    for step in others[: max(0, len(found) - limit)]:
        remove_folder(found[step])


def read_trainer_state(path: str | os.PathLike, remedy: str = "resume from another checkpoint") -> dict[str, Any]:
    """Read `trainer_state.json`; raises a ValueError that ends with `remedy` if it is damaged."""
    state = read_object(path, remedy)
    for name in ("global_step", "max_steps", "log_history"):
        if name not in state:
            raise ValueError(f"{path} lacks {name}: {remedy}")
    for name, value in state.items():
        if name not in _HINTS:
            raise ValueError(f"{path} has the unknown field {name!r:.60}: {remedy}")
        typed(value, _HINTS[name], f"{path}: {name}", remedy)
    for entry in state["log_history"]:
        typed(entry.get("step"), int, f"{path}: log_history: step", remedy)
    return state


def check_best(trainer_state: Mapping[str, Any], checkpoint: str | os.PathLike, output_dir: str | os.PathLike) -> None:
    """Raise a ValueError if the best checkpoint of a state is of another run.

    `Trainer` loads it at the end. It is of this run if it lies beside `checkpoint` or in `output_dir`, or if its
    history is the beginning of this one, as after a copy of the folder. One that does not exist is left to `Trainer`,
    which forgets it.
    """
    best = trainer_state.get("best_model_checkpoint")
    if best is None or "\0" in best or not Path(best).exists():
        return
    if Path(best).resolve().parent in (Path(checkpoint).resolve().parent, Path(output_dir).resolve()):
        return
    path, ours = Path(best) / TRAINER_STATE_NAME, trainer_state["log_history"]
    theirs = read_trainer_state(path)["log_history"] if path.is_file() else []
    if not theirs or repr(theirs) != repr(ours[: len(theirs)]):
        raise ValueError(
            f"{checkpoint}: {TRAINER_STATE_NAME} names the best checkpoint {best!r:.200}, which is not of this run: "
            "resume from another checkpoint"
        )
