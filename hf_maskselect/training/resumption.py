"""What a checkpoint must hold before a run goes on from it: all of its files, and a model of the same function."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.utils import CONFIG_NAME

from ..search.weight_files import LevelBest
from ..storage.runs import read_trainer_state
from ..storage.state import STATE_FILE, PruningState
from ..utils.reading import leaves_folder, parse_json, read_object, typed
from .repeatable_batches import batches_file

# Of checkpoints whose state lists no files, because an earlier version wrote it: one of each line must be there.
_UNLISTED = (
    (TRAINER_STATE_NAME,),
    (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN),
    (SCHEDULER_NAME,),
    ("rng_state.pth", "rng_state_0.pth"),
)
# Entries of a configuration that do not change what a model computes, or that a run writes into it.
_DESCRIPTIVE = {"architectures", "attn_implementation", "auto_map", "dtype", "finetuning_task", "id2label"}
_DESCRIPTIVE |= {"initializer_range", "label2id", "name_or_path", "output_attentions", "output_hidden_states"}
_DESCRIPTIVE |= {"problem_type", "pruning", "return_dict", "task_specific_params", "tokenizer_class", "torch_dtype"}
_DESCRIPTIVE |= {"transformers_version", "use_cache"}


def needed_files(trainer: Trainer, level_best: LevelBest | None) -> str:
    """Return what a resume from a checkpoint needs besides the model: a JSON object of file names and digests.

    A digest is empty where `Trainer` writes the file. That of the level's best weights ties them to their checkpoint.
    """
    args = trainer.args
    own = [args.process_index] if args.save_on_each_node else range(args.world_size)
    names = [TRAINER_STATE_NAME, SCHEDULER_NAME, *(_random_state(args.world_size, rank) for rank in own)]
    names += [batches_file(rank) for rank in own]
    names += [OPTIMIZER_NAME_BIN, f"{FSDP_MODEL_NAME}.bin"] if trainer.is_fsdp_enabled else [OPTIMIZER_NAME]
    names += [SCALER_NAME] if trainer.accelerator.scaler is not None else []
    best = {} if level_best is None else level_best.digests()
    return json.dumps({**dict.fromkeys(names, ""), **best})


def _random_state(processes: int, rank: int) -> str:
    """Return the name that `Trainer` gives the file of a process's random state."""
    return f"rng_state_{rank}.pth" if processes > 1 else "rng_state.pth"


def _listed(state: PruningState, where: Path) -> dict[str, str]:
    """Return the files and digests that a state lists; empty where an earlier version wrote it."""
    digests = typed(parse_json(state.needs or "{}", where), dict[str, str], where)
    if any(leaves_folder(name) for name in digests):
        raise ValueError(f"{where} lists a file outside its folder: restore the file")
    return digests


def check_complete(checkpoint: str | os.PathLike, trainer: Trainer) -> None:
    """Raise a ValueError unless a checkpoint has every file that a resume needs, or if it has one of another run.

    Warn if the random state of this process is not among them.
    """
    folder, state = Path(checkpoint), PruningState.load(checkpoint)
    digests = _listed(state, folder / STATE_FILE)
    choices = [(name,) for name in digests] or _UNLISTED
    missing = [names[0] for names in choices if not any((folder / name).exists() for name in names)]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, so a resumed run would differ: it was saved with "
            "save_only_model=True, or files were lost; name a complete checkpoint, or start a new run from its model"
        )
    trainer_state = read_trainer_state(folder / TRAINER_STATE_NAME)  # `Trainer` reads it before it loads the model
    where = f"{folder / TRAINER_STATE_NAME}: train_batch_size"
    typed(trainer_state.get("train_batch_size"), int, where, "resume from another checkpoint")
    if digests:
        LevelBest(folder).check(digests)
    own = _random_state(trainer.args.world_size, trainer.args.process_index)
    if not (folder / own).is_file():
        warnings.warn(
            f"{folder} has no {own}, because another number of processes wrote it: the run goes on, but not to the "
            "same bits",
            stacklevel=2,
        )


def check_function(checkpoint: str | os.PathLike, model: nn.Module) -> None:
    """Raise a ValueError unless a model has the configuration that its checkpoint was written with.

    Weights of equal shapes say nothing of an activation, the number of heads or a dropout.
    """
    if not isinstance(model, PreTrainedModel):
        return
    cls = type(model.config)
    saved = read_object(Path(checkpoint) / CONFIG_NAME, "restore the file")
    # Both go the same way, so that each has the defaults of this version of transformers.
    then, now = (cls.from_dict(entries).to_dict() for entries in (saved, json.loads(model.config.to_json_string())))
    for name, before, after in _differences(then, now):
        raise ValueError(
            f"the checkpoint {checkpoint} was written with {name}={before!r} in the model's configuration but this "
            f"run has {after!r}, which computes something else: load the model with the same configuration, or start "
            "a new run from the checkpoint's model"
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value then, value now) of the entries that differ. The class reads no entry that only one has."""
    for name in sorted(then.keys() & now.keys() - _DESCRIPTIVE):
        before, after = then[name], now[name]
        if name.startswith("_") or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", before, after
