"""Load a pruned model, packed or not, from a folder or the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..masking.maskset import MaskSet
from .models import load_strictly, model_class, pruned_modules_of, skeleton
from .packed_file import DENSE, PACKED_FILE, PackedFile
from .state import STATE_FILE, PruningState
from .weights import config_digest

# What makes a model folder besides its weights; not what a checkpoint keeps for the trainer.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.png")
_WEIGHT_FILES = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)


def open_packed(folder: str | os.PathLike, file: str = PACKED_FILE, command: str = "pack") -> PackedFile:
    """The packed file of a folder, checked against the `config.json` beside it; command: what writes such a file.

    Raises:
        ValueError: none there, damaged, or of another model.
    """
    folder = Path(folder)
    if not (folder / file).is_file():
        raise ValueError(f"{folder} has no {file}: give a folder that `hf-maskselect {command}` wrote")
    packed = PackedFile(folder / file)
    if config_digest(folder) != packed.metadata.get("config"):
        raise ValueError(f"{folder}: config.json is not the one that {file} was made with; restore the file")
    known = {name: tuple(tensor.shape) for name, tensor in skeleton(folder).state_dict().items()}
    for name, entry in packed.entries.items():
        # A sparse tensor may be far larger than its bytes: its size must be the model's before it is made.
        if entry.coding not in DENSE and known.get(name) != entry.shape:
            raise ValueError(
                f"{packed.path}: {name} has shape {entry.shape} but config.json describes {known.get(name)}; the file "
                "is of another model"
            )
    return packed


def load_pruned(path_or_repo: str | os.PathLike, **options) -> tuple[PreTrainedModel, MaskSet]:
    """The model and its masks, ready to be trained on with its zeros kept.

    Args:
        path_or_repo: a folder or a Hub repository: of `PruningTrainer`, packed (`hf-maskselect pack`), or any saved
            model of transformers with zeros, whose masks are then taken from `MaskSet.from_zeros`. Of a folder that
            holds both, the ordinary weights are read; of a repository, the packed ones are downloaded.
        options: for `from_pretrained`, those of the configuration (such as `hidden_dropout_prob=0.3`) among them;
            `revision`, `token` and `cache_dir` also for the download.

    Raises:
        ValueError: nothing to load there, or files that are damaged or do not fit each other.
    """
    if elsewhere := {"subfolder", "variant", "gguf_file"} & options.keys():
        raise ValueError(f"load_pruned takes no {sorted(elsewhere)[0]}: what is checked lies in the folder itself")
    told = {name: options.pop(name) for name in ("revision", "token", "cache_dir") if name in options}
    folder = find_folder(path_or_repo, packed=True, **told)
    if (folder / SAFE_WEIGHTS_NAME).is_file() or (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        state = PruningState.find(folder)
        if state is not None:
            state.check_saved(folder)
        model = load_strictly(model_class(folder)[0], folder, folder, ("missing_keys",), **options)
        return model, _of_zeros(model) if state is None else state.masks
    if not (folder / PACKED_FILE).is_file():
        raise ValueError(
            f"{folder} has no {PACKED_FILE} and no {SAFE_WEIGHTS_NAME}: give the folder of a saved model, or one that "
            "`hf-maskselect pack` wrote"
        )
    packed = open_packed(folder)
    names, state = _pruning_fields(packed)
    tensors, masks = {}, {}
    for name in packed.entries:
        tensors[name], mask = packed.tensor_and_mask(name)
        if name in names:
            masks[name] = torch.ones_like(tensors[name], dtype=torch.bool) if mask is None else mask
    found = MaskSet(masks)
    if names and found.digest() != state["digest"]:
        raise ValueError(f"{packed.path} is damaged: its masks do not match their digest; restore the file")
    # The configuration by its folder: from_pretrained takes what of the options belongs to it only when it reads it.
    options = {"config": folder, **options}
    model = load_strictly(model_class(folder)[0], folder, None, ("missing_keys",), state_dict=tensors, **options)
    return model, found if names else _of_zeros(model)


def _of_zeros(model: PreTrainedModel) -> MaskSet:
    """`MaskSet.from_zeros`, over what the model's run pruned where its configuration tells that."""
    return MaskSet.from_zeros(model, **pruned_modules_of(model))


def find_folder(
    path_or_repo: str | os.PathLike, packed: bool = False, weights: Sequence[str] = _WEIGHT_FILES, **told
) -> Path:
    """The folder itself, or the files of a Hub repository that loading needs.

    Args:
        packed: take the packed weights of a repository that has them, if they are those its state belongs to.
        weights: names (or globs) of the files to download else.
        told: `revision`, `token` and `cache_dir` of the download.

    Raises:
        ValueError: there is neither.
    """
    if Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    repo = os.fspath(path_or_repo)
    try:
        if packed:
            folder = Path(snapshot_download(repo, allow_patterns=[*_COMPANIONS, STATE_FILE, PACKED_FILE], **told))
            if _belongs(folder):
                return folder
        return Path(snapshot_download(repo, allow_patterns=[*_COMPANIONS, STATE_FILE, *weights], **told))
    except (OSError, HTTPError, HFValidationError) as error:
        raise ValueError(
            f"{repo} is no folder, and cannot be had from the Hub ({str(error).splitlines()[0]}): check the name "
            "and the connection"
        ) from error


def _belongs(folder: Path) -> bool:
    """Whether the packed weights of a repository are there and not left over from an earlier model."""
    if not (folder / PACKED_FILE).is_file():
        return False
    state, (_, fields) = PruningState.find(folder), _pruning_fields(PackedFile(folder / PACKED_FILE))
    return state is None or fields.get("weights") == state.weights


def _pruning_fields(packed: PackedFile) -> tuple[set[str], dict[str, str]]:
    """(names of the masked tensors, fields of their `PruningState` and digest); empty for a foreign model."""
    if "pruning" not in packed.metadata:
        return set(), {}
    try:
        fields = json.loads(packed.metadata["pruning"])
        names = set(fields.pop("masked"))
        PruningState.from_fields(MaskSet({}), fields)
        if not names <= packed.entries.keys() or "digest" not in fields:
            raise ValueError("masks of tensors it does not hold")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{packed.path} is damaged: its header does not describe masks ({error})") from error
    return names, fields
