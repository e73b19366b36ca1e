"""Checks before the first step of what would fail hours later: the output folder, the weights and the rows."""

import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.trainer_utils import IntervalStrategy

from ..config import PruningConfig
from ..search.bench import TrialBench
from ..utils.swapped import overrides
from .check_values import check_values


def check_inputs(trainer: Any, bench: TrialBench) -> None:
    """Check that the model can learn and be saved, and that the values of the rows fit it.

    Args:
        trainer: the `PruningTrainer`, before the run.
        bench: loads batches and restores random states.

    Raises:
        ValueError: something of these would fail in the middle of the run.
    """
    check_output_dir(trainer.args, writes=True)
    check_trainable(trainer)
    check_savable(trainer)
    check_values(trainer, bench)


def check_output_dir(args: PruningConfig, writes: bool = False) -> None:
    """Make the output folder, and if a run `writes`, check that files can be written into it.

    Raises:
        ValueError: they cannot.
    """
    folder = args.output_dir
    if not args.should_save or folder is None:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        if writes:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0")
    except (OSError, ValueError) as error:  # a ValueError where the name holds a null character
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise ValueError(
            f"output_dir={folder!r} cannot be written ({reason}): choose a folder that can, or mend its permissions"
        ) from error


def check_trainable(trainer: Any) -> None:
    """Refuse a model that is frozen everywhere, unless something beside it may learn."""
    if any(parameter.requires_grad for parameter in trainer.model.parameters()):
        return
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    beside = [parameter for group in groups for parameter in group["params"]]
    own = [overrides(trainer, name, Trainer) for name in ("create_optimizer", "training_step")]
    if trainer.own_loss or trainer.compute_loss_func is not None or any(own) or any(p.requires_grad for p in beside):
        return
    raise ValueError(
        f"no parameter of {type(trainer.model).__name__} requires a gradient, so nothing can be trained: call "
        "model.requires_grad_(True), or leave at least the head trainable"
    )


def check_savable(trainer: Any) -> None:
    """Refuse weights that are shared where the model does not say so: neither a save nor a load goes with them.

    A run that saves nothing is only warned, and a save of the user's own is left alone.
    """
    model, args = trainer.model, trainer.args
    saves = (type(trainer)._save, type(trainer).save_model, getattr(model, "save_pretrained", None))
    own = any(save.__module__.partition(".")[0] not in ("transformers", "hf_maskselect") for save in saves if save)
    if own or trainer.is_fsdp_enabled:
        return
    state, error = model.state_dict(), None
    if isinstance(model, PreTrainedModel):
        state = {name: tensor for name, tensor in state.items() if name not in (model._keys_to_ignore_on_save or ())}
        try:
            state = remove_tied_weights_from_state_dict(state, model)
        except RuntimeError as found:
            error = found
    shared = _shared(state) if error is not None or not isinstance(model, PreTrainedModel) else []
    if not shared:
        return
    text = (
        f"{' and '.join(shared)} of {type(model).__name__} are one tensor, which cannot be saved: give each layer a "
        "copy (nn.Parameter(weight.clone())), or name the tie in _tied_weights_keys of the class and make it there"
    )
    if args.save_strategy != IntervalStrategy.NO or args.push_to_hub:
        raise ValueError(text) from error
    warnings.warn(text, stacklevel=2)


def _shared(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the first tensor that a state dictionary holds more than once; empty if there is none."""
    names: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.numel() and tensor.device.type != "meta":
            names.setdefault((tensor.device, tensor.data_ptr()), []).append(name)
    return next((shared for shared in names.values() if len(shared) > 1), [])
