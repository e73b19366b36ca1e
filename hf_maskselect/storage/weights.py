"""Read the saved weights of a model and compare them with masks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..masking.maskset import MaskSet, diverged
from ..utils.digests import WeightsDigest
from ..utils.files import read_object
from .packed_file import PACKED_FILE

# What of config.json says nothing about the function that the model computes.
_DESCRIPTIVE = ("_name_or_path", "finetuning_task", "id2label", "label2id", "transformers_version")


def saved_tensors(folder: str | os.PathLike) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the weights saved in `folder`; they are mapped, and read when they are used.

    Raises:
        ValueError: no safetensors weights there.
    """
    folder = Path(folder)
    if (folder / SAFE_WEIGHTS_NAME).is_file():  # in the order in which from_pretrained looks
        files = [folder / SAFE_WEIGHTS_NAME]
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        files = [folder / name for name in shard_names(folder / SAFE_WEIGHTS_INDEX_NAME)]
    else:
        check_unpacked(folder)
        raise ValueError(f"{folder} holds no {SAFE_WEIGHTS_NAME}: give the folder of a model saved by save_pretrained")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as weights ({error}); restore the file") from error


def check_unpacked(folder: str | os.PathLike) -> None:
    """Raise a ValueError where a folder holds a packed model only."""
    folder = Path(folder)
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if (folder / PACKED_FILE).is_file() and not any((folder / name).is_file() for name in weights):
        raise ValueError(
            f"{folder} holds a packed model: write it as an ordinary one first, with `hf-maskselect unpack {folder} "
            "--output FOLDER`"
        )


def shard_names(path: Path) -> list[str]:
    """The files that an index of sharded weights names, all of its own folder.

    Raises:
        ValueError: it is damaged.
    """
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files of its folder")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an index of weights ({error}); restore the file") from error
    return names


def check_present(folder: str | os.PathLike, prunable: Set[str], saved: Iterable[str]) -> None:
    """Raise a ValueError unless all prunable weights are among the names of those saved in `folder`."""
    if missing := prunable - set(saved):
        raise ValueError(
            f"{folder}: {min(missing)} is prunable but not saved: its weights are of another model, or under the "
            "names of older files; for those, load it with from_pretrained and save it again with "
            "save_pretrained(..., save_original_format=False)"
        )


def check_weights(folder: str | os.PathLike, masks: MaskSet) -> str:
    """Re-read the saved weights and compare them with the masks.

    Returns:
        `WeightsDigest` of all tensors, whatever files they lie in.

    Raises:
        ValueError: a masked weight is missing, or not zero where its mask says so.
    """
    digest = WeightsDigest()

    def check(named: tuple[str, torch.Tensor]) -> None:
        name, tensor = named
        digest.add(name, tensor)
        if name in masks:
            check_zeros(folder, name, tensor, masks[name])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one core takes one digest; nothing is read before
        for _ in pool.map(check, saved_tensors(folder)):
            pass
    if missing := masks.keys() - digest.names:
        raise ValueError(
            f"{folder}: {sorted(missing)[0]} is masked but not in the file; the weights are of another model"
        )
    return digest.hex()


def check_zeros(folder: str | os.PathLike, name: str, tensor: torch.Tensor, mask: torch.Tensor) -> None:
    """Raise a ValueError unless one saved tensor is zero where its mask says so."""
    if tensor.shape != mask.shape:
        raise ValueError(
            f"{folder}: {name} has shape {tuple(tensor.shape)} but its mask has {tuple(mask.shape)}; the masks are of "
            "another model"
        )
    alive = int(torch.count_nonzero(tensor.ne(0).gt_(mask.cpu())))  # not zero, and not kept
    if alive:
        if not bool(torch.isfinite(tensor).all()):  # NaN times 0 is NaN
            raise ValueError(f"{folder}: {diverged(name)}")
        raise ValueError(
            f"{folder}: {name} has {alive} non-zero weights where its mask is zero; the file was changed after "
            "pruning or written without it, so save it again from the trainer"
        )


def config_digest(folder: str | os.PathLike) -> str:
    """SHA-256 over what `config.json` says of the function the model computes (not of its labels); empty where there
    is no such file, as for a module that is not of transformers."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return ""
    found = read_object(path, "restore the file")
    told = {name: value for name, value in found.items() if name not in _DESCRIPTIVE}
    labels = found.get("id2label")  # the names may change, their number is the head's size: 2 where none are told
    told["labels"] = len(labels) if isinstance(labels, dict) else 2
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
