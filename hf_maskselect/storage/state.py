"""What is written beside the weights, and how a saved folder is checked against it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..masking.maskset import MaskSet
from ..masking.patterns import NM, parse_pattern
from ..masking.targets import transposed_weights
from ..methods.hard import diverged
from ..utils.files import bytes_of, read_object, replacing
from .models import load_strictly, model_class, skeleton
from .packed_file import PACKED_FILE
from .two_of_four import check_groups

STATE_FILE = "pruning_state.safetensors"


_FIELDS = {"method": str, "pattern": str, "sparsity": float, "step": int, "level": int, "seed": int, "start": float}
_TEXTS = ("architecture", "weights", "config")
# What of config.json says nothing about the function that the model computes.
_DESCRIPTIVE = ("_name_or_path", "finetuning_task", "id2label", "label2id", "transformers_version")


@dataclass(frozen=True)
class PruningState:
    """Masks in force and where the run stood; `pruning_state.safetensors` on disk, bit-packed, no pickle.

    sparsity: the run's target; step: optimizer steps done; level: index of the level in force, -1 before the first
    cut; start: sparsity of the model the run began with; architecture: the model's class; weights, config: SHA-256 of
    the weights and of the configuration that it was saved with, empty before.
    """

    masks: MaskSet
    method: str
    pattern: str
    sparsity: float
    step: int
    level: int
    seed: int
    start: float = 0.0
    architecture: str = ""
    weights: str = ""
    config: str = ""

    @property
    def fields(self) -> dict[str, str]:
        """Everything but the masks, as text."""
        return {name: str(getattr(self, name)) for name in (*_FIELDS, *_TEXTS)}

    @classmethod
    def from_fields(cls, masks: MaskSet, fields: Mapping[str, str]) -> PruningState:
        """The inverse of `fields`; a KeyError or ValueError for what is no such text."""
        values = {name: kind(fields[name]) for name, kind in _FIELDS.items()}
        return cls(masks, **values, **{name: fields[name] for name in _TEXTS})

    def sealed(self, folder: str | os.PathLike) -> PruningState:
        """The state that belongs to what is saved in `folder`: it knows those weights and that configuration.

        Raises:
            ValueError: the saved weights are not zero where the masks are.
        """
        return replace(self, weights=check_weights(folder, self.masks), config=config_digest(folder))

    def save(self, folder: str | os.PathLike, method_state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the state into `folder`, with what the method needs to resume."""
        with replacing(Path(folder) / STATE_FILE) as path:
            self.masks.save(path, self.fields, method_state)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> PruningState:
        """Read the state of a saved folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            check_unpacked(folder)
            raise ValueError(
                f"{folder} has no {STATE_FILE}, so it is no checkpoint of a pruning run: point to a folder that "
                "PruningTrainer saved, or start a new run from this model"
            )
        masks, meta = MaskSet.load(path)
        try:
            return cls.from_fields(masks, meta)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path} holds masks but says nothing readable of its run ({error}): point to a folder that "
                "PruningTrainer saved"
            ) from error

    @classmethod
    def find(cls, folder: str | os.PathLike) -> PruningState | None:
        """`load`, or None where the folder has no such file."""
        return cls.load(folder) if (Path(folder) / STATE_FILE).is_file() else None

    def check_step(self, step: int, folder: str | os.PathLike) -> None:
        """Raise a ValueError unless the trainer's own state was saved at the same step."""
        if step != self.step:
            raise ValueError(
                f"{folder}: {STATE_FILE} is of step {self.step} but trainer_state.json of step {step}; the files do "
                "not belong together, so resume from another checkpoint"
            )

    def check_saved(self, folder: str | os.PathLike) -> None:
        """Raise a ValueError unless `folder` holds, to the bit, the weights this state was saved with."""
        for what, now, then in (
            ("the weights are not those", check_weights(folder, self.masks), self.weights),
            ("config.json is not the one", config_digest(folder), self.config),
        ):
            if now != then:
                raise ValueError(changed(folder, what))

    def check_resumes(self, method: str, pattern: str, sparsity: float, architecture: str = "") -> None:
        """Raise a ValueError when the run that wants to go on is another one; an unknown architecture is any."""
        architecture = architecture if self.architecture else ""
        given = {"method": method, "pattern": pattern, "sparsity": sparsity, "architecture": architecture}
        for name, now in given.items():
            then = getattr(self, name)
            if then != now:
                raise ValueError(
                    f"the checkpoint was written with {name}={then!r} but this run has {name}={now!r}: resume with "
                    "the same value, or start a new run from the checkpoint's model"
                )


def load_method_state(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """What `PruningState.save` was given beside the masks; empty for hard methods.

    Raises:
        ValueError: damaged.
    """
    return MaskSet.load_beside(Path(folder) / STATE_FILE)


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


class WeightsDigest:
    """SHA-256 over names, dtypes, shapes and bits of tensors, in whatever order they come."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        content = hashlib.sha256(bytes_of(tensor)).hexdigest()
        self._lines[name] = f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{content}"

    @property
    def names(self) -> set[str]:
        return set(self._lines)

    def hex(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._lines.values())).encode()).hexdigest()


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


def changed(folder: str | os.PathLike, what: str) -> str:
    """The sentence for a folder whose files do not belong together."""
    return (
        f"{folder}: {what} that {STATE_FILE} was saved with; restore the file, or, if it was changed on purpose, "
        f"delete {STATE_FILE}: masks are then taken from the zeros"
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


def parse_groups(pattern: str) -> NM:
    """The N:M pattern that a text names.

    Raises:
        ValueError: it names another, or none.
    """
    groups = parse_pattern(pattern)
    if not isinstance(groups, NM):
        raise ValueError(f"pattern={pattern!r} is not checked by itself: give an N:M pattern such as '2:4'")
    return groups


def verify(folder: str | os.PathLike, pattern: str | None = None) -> PruningState:
    """Everything a user may rely on: the zeros are the masks, their count is the target's and their places are those
    of the pattern that the folder was pruned to, the model loads plainly.

    Args:
        pattern: `"N:M"`; every masked matrix must hold it along its input axis, whatever it was pruned to.

    Returns:
        the pruning state of the folder.

    Raises:
        ValueError: the first thing that does not hold, with the tensor or the counts.
    """
    groups = None if pattern is None else parse_groups(pattern)
    state = PruningState.load(folder)
    state.check_saved(folder)
    if groups is not None and (turned := sorted(transposed_weights(skeleton(folder)) & state.masks.keys())):
        raise ValueError(f"{turned[0]} belongs to a Conv1D, which stores it transposed: it cannot hold {pattern}")
    for name, tensor in saved_tensors(folder):
        if name not in state.masks:
            continue
        if groups is not None:
            check_groups(name, tensor, groups.n, groups.m)
        found, kept = int(tensor.count_nonzero()), int(state.masks[name].count_nonzero())
        if found != kept:
            raise ValueError(
                f"{folder}: {name} has {found} non-zero weights but its mask keeps {kept}: weights that are kept were "
                "still zero when they were saved, so train longer, or start from a model without zeros at these places"
            )
    pruned_to = parse_pattern(state.pattern)
    wanted = pruned_to.keeps([mask.shape for mask in state.masks.values()], state.sparsity)
    if state.masks.kept != wanted:
        raise ValueError(
            f"{folder}: {state.masks.kept} of {state.masks.total} prunable weights are kept but sparsity "
            f"{state.sparsity} with pattern {state.pattern!r} keeps {wanted}; the run had not reached its last level "
            f"(step {state.step}, level {state.level + 1})"
        )
    for name, mask in state.masks.items():
        pruned_to.check(name, mask.shape)
        if not pruned_to.holds(mask, state.sparsity):
            raise ValueError(
                f"{folder}: {name} keeps as many weights as pattern {state.pattern!r} at sparsity {state.sparsity:g}, "
                "but in other places; prune a dense model to it, or this one with keep_zeros=False"
            )
    cls, _ = model_class(folder)
    load_strictly(cls, folder, folder, ("missing_keys", "unexpected_keys"))
    return state
