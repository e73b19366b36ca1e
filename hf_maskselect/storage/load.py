"""Load a pruned model with its masks, packed or not, from a folder or the Hub."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..masking.maskset import MaskSet
from .folders import find_folder
from .models import load_strictly, model_class, pruned_modules_of
from .pack import open_packed, pruning_of, tensors_and_masks
from .packed_file import PACKED_FILE, PackedFile
from .state import PruningState
from .weights import has_weights


def load_pruned(path_or_repo: str | os.PathLike, **options) -> tuple[PreTrainedModel, MaskSet]:
    """Load a model and its masks, ready to be trained on with its zeros kept.

    Args:
        path_or_repo: a folder or a Hub repository, written by `PruningTrainer` or `hf-maskselect pack`, or holding any
            saved transformers model with zeros (its masks are then `MaskSet.from_zeros`). If a folder holds ordinary
            and packed weights, the ordinary ones are read; from a repository, the packed ones are downloaded.
        options: passed to `from_pretrained`, including fields of the configuration such as `hidden_dropout_prob=0.3`;
            `revision`, `token` and `cache_dir` also apply to the download.

    Raises:
        ValueError: there is no model, or its files are damaged or do not belong together.
    """
    if unsupported := {"subfolder", "variant", "gguf_file"} & options.keys():
        raise ValueError(f"load_pruned takes no {min(unsupported)}: give the folder that holds the files to load")
    download = {name: options.pop(name) for name in ("revision", "token", "cache_dir") if name in options}
    folder = _find_model(path_or_repo, **download)
    if has_weights(folder):
        state = PruningState.find(folder)
        if state is not None:
            state.check_saved(folder)
        model = load_strictly(model_class(folder)[0], folder, **options)
        return model, _masks_of_zeros(model) if state is None else state.masks
    if not (folder / PACKED_FILE).is_file():
        raise ValueError(
            f"{folder} has no {PACKED_FILE} and no {SAFE_WEIGHTS_NAME}: give the folder of a saved model, or one that "
            "`hf-maskselect pack` wrote"
        )
    packed = open_packed(folder)
    pruning = pruning_of(packed)
    tensors, masks = {}, {}
    for name, tensor, mask in tensors_and_masks(packed, pruning):
        tensors[name] = tensor
        if mask is not None:
            masks[name] = mask
    if pruning is not None:
        pruning.check_digest(MaskSet(masks).digest(), packed)
    # Give the configuration by its folder: from_pretrained uses the options that belong to it only when it reads it.
    model = load_strictly(model_class(folder)[0], folder, **{"config": folder, **options, "state_dict": tensors})
    return model, _masks_of_zeros(model) if pruning is None else MaskSet(masks)


def _find_model(path_or_repo: str | os.PathLike, **download: Any) -> Path:
    """Find the folder of a model; download only the packed weights of a repository that has current ones."""
    if not Path(path_or_repo).is_dir():
        folder = find_folder(path_or_repo, weights=[PACKED_FILE], **download)
        if _is_current(folder):
            return folder
    return find_folder(path_or_repo, **download)


def _is_current(folder: Path) -> bool:
    """Return whether a repository has packed weights that belong to its pruning state, not to an earlier model."""
    if not (folder / PACKED_FILE).is_file():
        return False
    state, pruning = PruningState.find(folder), pruning_of(PackedFile(folder / PACKED_FILE))
    return state is None or (pruning is not None and pruning.state.weights == state.weights)


def _masks_of_zeros(model: PreTrainedModel) -> MaskSet:
    """Return the masks of a model's zeros, in the modules that its configuration names as pruned, if it does."""
    return MaskSet.from_zeros(model, **pruned_modules_of(model))
