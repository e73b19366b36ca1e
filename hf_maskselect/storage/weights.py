"""Read the saved weights of a model and compare them with masks."""

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..masking.maskset import diverged
from ..masking.tensor_files import TensorFile
from ..utils.digests import WeightsDigest
from ..utils.folders import finish
from ..utils.reading import leaves_folder, read_object, typed
from .packed_file import PACKED_FILE


def weight_files(folder: str | os.PathLike) -> list[TensorFile]:
    """Open the files that `from_pretrained` would read the weights of a folder from.

    Raises:
        ValueError: there are none, one is damaged, or a tensor is in none or in several of them.
    """
    folder = Path(folder)
    finish(folder)
    if (folder / SAFE_WEIGHTS_NAME).is_file():  # from_pretrained looks in this order
        return [TensorFile(folder / SAFE_WEIGHTS_NAME, "weights")]
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        check_unpacked(folder)
        raise ValueError(f"{folder} holds no {SAFE_WEIGHTS_NAME}: give the folder of a model saved by save_pretrained")
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    places = read_index(index)
    files = [TensorFile(folder / name, "weights") for name in sorted(set(places.values()))]
    found: dict[str, str] = {}
    for file in files:
        for name in file.shapes:
            if name in found:
                raise ValueError(f"{folder}: {name} is in {found[name]} and in {file.path.name}: save the model again")
            found[name] = file.path.name
    for name, place in places.items():
        if found.get(name) != place:
            raise ValueError(f"{index} says that {name} is in {place}, which lacks it: save the model again")
    return files


def saved_tensors(folder: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the saved weights, memory-mapped; raises a ValueError as `weight_files`."""
    for file in weight_files(folder):
        for name in file.shapes:
            yield name, file.tensor(name)


def has_weights(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds ordinary safetensors weights, in one file or in shards."""
    finish(folder)
    return any((Path(folder) / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def check_unpacked(folder: str | os.PathLike) -> None:
    """Raise a ValueError if a folder holds only a packed model."""
    if (Path(folder) / PACKED_FILE).is_file() and not has_weights(folder):
        raise ValueError(
            f"{folder} holds a packed model: unpack it first, with `hf-maskselect unpack {folder} --output FOLDER`"
        )


def read_index(path: Path) -> dict[str, str]:
    """Read which file of its folder each tensor is in; raises a ValueError if an index of weights is damaged."""
    content = read_object(path)
    if not isinstance(content.get("metadata"), dict):  # transformers reads it too
        raise ValueError(f"{path} has no metadata: save the model again")
    places = typed(content.get("weight_map"), dict[str, str], f"{path}: weight_map")
    for name in places.values():
        if leaves_folder(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {name!r}, which is no safetensors file of its folder: save the model again"
            )
    if not places:
        raise ValueError(f"{path} names no tensors: save the model again")
    return places


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
