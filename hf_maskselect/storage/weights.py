"""Read the saved weights of a model and compare them with masks."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..masking.maskset import diverged
from ..utils.digests import WeightsDigest
from .packed_file import PACKED_FILE


def saved_tensors(folder: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the saved weights, memory-mapped; raises a ValueError if there are none to read."""
    folder = Path(folder)
    if (folder / SAFE_WEIGHTS_NAME).is_file():  # from_pretrained looks in this order
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


def has_weights(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds ordinary safetensors weights, in one file or in shards."""
    return any((Path(folder) / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def check_unpacked(folder: str | os.PathLike) -> None:
    """Raise a ValueError if a folder holds only a packed model."""
    if (Path(folder) / PACKED_FILE).is_file() and not has_weights(folder):
        raise ValueError(
            f"{folder} holds a packed model: unpack it first, with `hf-maskselect unpack {folder} --output FOLDER`"
        )


def shard_names(path: Path) -> list[str]:
    """Read the file names from an index of sharded weights; raises a ValueError if it is damaged."""
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files of its folder")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an index of weights ({error}); restore the file") from error
    return names


def check_present(folder: str | os.PathLike, prunable: Set[str], saved: Iterable[str]) -> None:
    """Raise a ValueError unless the names saved in `folder` include all prunable weights."""
    if missing := prunable - set(saved):
        raise ValueError(
            f"{folder}: {min(missing)} is prunable but not saved: its weights are of another model, or under the "
            "names of older files; for those, load it with from_pretrained and save it again with "
            "save_pretrained(..., save_original_format=False)"
        )


def check_weights(folder: str | os.PathLike, masks: Mapping[str, Tensor]) -> str:
    """Read the saved weights, compare them with the masks, and return the `WeightsDigest` of all tensors.

    Raises:
        ValueError: a masked weight is missing, or is not zero where its mask is False.
    """
    digest = WeightsDigest()

    def check(named: tuple[str, Tensor]) -> None:
        name, tensor = named
        digest.add(name, tensor)
        if name in masks:
            check_zeros(folder, name, tensor, masks[name])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing takes one core per tensor
        for _ in pool.map(check, saved_tensors(folder)):
            pass
    if missing := masks.keys() - digest.names:
        raise ValueError(f"{folder}: {min(missing)} is masked but not in the file; the weights are of another model")
    return digest.hex()


def check_zeros(folder: str | os.PathLike, name: str, tensor: Tensor, mask: Tensor) -> None:
    """Raise a ValueError unless a saved tensor is zero where its mask is False."""
    if tensor.shape != mask.shape:
        raise ValueError(
            f"{folder}: {name} has shape {tuple(tensor.shape)} but its mask has {tuple(mask.shape)}; the masks are of "
            "another model"
        )
    unmasked = int(torch.count_nonzero(tensor.ne(0).gt_(mask.cpu())))  # not zero, and not kept
    if unmasked:
        if not bool(torch.isfinite(tensor).all()):  # NaN times 0 is NaN
            raise ValueError(f"{folder}: {diverged(name)}")
        raise ValueError(
            f"{folder}: {name} has {unmasked} non-zero weights where its mask is zero; the file was changed after "
            "pruning or not written by the trainer, so save it again from the trainer"
        )
