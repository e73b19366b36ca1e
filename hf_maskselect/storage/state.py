"""The pruning state: the masks and the position of a run, saved beside the weights and checked against them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..masking.maskset import MaskSet
from ..utils.files import replacing
from ..utils.folders import finish
from .models import config_digest
from .weights import check_unpacked, check_weights

STATE_FILE = "pruning_state.safetensors"

NO_TEACHER = "none"

_FIELDS = {"method": str, "pattern": str, "sparsity": float, "step": int, "level": int, "seed": int, "start": float}
_TEXTS = ("architecture", "weights", "config")
_LATER = ("needs", "teacher", "criterion")  # states of earlier versions lack it


@dataclass(frozen=True)
class PruningState:
    """Masks in force and the position of the run, saved bit-packed in `pruning_state.safetensors`.

    sparsity: target of the run; step: optimizer steps done; level: index of the level in force, -1 before the first
    cut; start: sparsity of the model that the run began with; architecture: class name of the model; weights, config:
    SHA-256 of the saved weights and configuration, empty before they are saved; needs: the other files that a resume
    needs, with digests where they have one, as JSON; empty where no run goes on from; teacher: SHA-256 of its weights,
    or `NO_TEACHER`; criterion: what a soft method began from, empty for hard masks.
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
    needs: str = ""
    teacher: str = ""
    criterion: str = ""

    @property
    def fields(self) -> dict[str, str]:
        """All fields except the masks, as text."""
        return {name: str(getattr(self, name)) for name in (*_FIELDS, *_TEXTS, *_LATER)}

    @classmethod
    def from_fields(cls, masks: MaskSet, fields: Mapping[str, str]) -> PruningState:
        """Build a state from `fields`; raises a KeyError or ValueError for missing or unreadable ones."""
        values: dict[str, Any] = {name: kind(fields[name]) for name, kind in _FIELDS.items()}
        values |= {name: fields[name] for name in _TEXTS}
        return cls(masks, **values | {name: fields.get(name, "") for name in _LATER})

    def sealed(self, folder: str | os.PathLike) -> PruningState:
        """Return this state with the digests of the saved weights, after `check_weights`, and of the configuration."""
        return replace(self, weights=check_weights(folder, self.masks), config=config_digest(folder))

    def save(self, folder: str | os.PathLike, method_state: Mapping[str, Tensor] | None = None) -> None:
        """Write the state into `folder`, with the tensors that the method needs to resume."""
        with replacing(Path(folder) / STATE_FILE) as path:
            self.masks.save(path, self.fields, method_state)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> PruningState:
        """Read the state of a saved folder; raises a ValueError if there is none or it is damaged."""
        finish(folder)
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            check_unpacked(folder)
            raise ValueError(
                f"{folder} has no {STATE_FILE}, so it is no checkpoint of a pruning run: point to a folder that "
                "PruningTrainer saved, or start a new run from this model"
            )
        masks, fields = MaskSet.load(path)
        try:
            return cls.from_fields(masks, fields)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path} holds masks but no readable state of a run ({error}): point to a folder that PruningTrainer "
                "saved"
            ) from error

    @classmethod
    def find(cls, folder: str | os.PathLike) -> PruningState | None:
        """Read the state of a folder by `load`; None if the folder has no such file."""
        finish(folder)
        return cls.load(folder) if (Path(folder) / STATE_FILE).is_file() else None

    def check_step(self, step: int, folder: str | os.PathLike) -> None:
        """Raise a ValueError unless the trainer's own state was saved at the same step."""
        if step != self.step:
            raise ValueError(
                f"{folder}: {STATE_FILE} is of step {self.step} but trainer_state.json of step {step}; the files do "
                "not belong together, so resume from another checkpoint"
            )

    def check_saved(self, folder: str | os.PathLike) -> None:
        """Raise a ValueError unless `folder` holds exactly the weights and configuration of this state."""
        if check_weights(folder, self.masks) != self.weights:
            raise ValueError(changed_message(folder, "the weights are not those"))
        if config_digest(folder) != self.config:
            raise ValueError(changed_message(folder, "config.json is not the one"))

    def check_resumes(self, method: str, pattern: str, sparsity: float, architecture: str = "") -> None:
        """Raise a ValueError if the run that resumes differs from the saved one; an unknown architecture matches."""
        architecture = architecture if self.architecture else ""
        current = {"method": method, "pattern": pattern, "sparsity": sparsity, "architecture": architecture}
        for name, now in current.items():
            _check_same(name, getattr(self, name), now)

    def check_criterion(self, criterion: str) -> None:
        """Raise a ValueError if a soft method, which began from one criterion, would go on with another.

        Earlier versions began from magnitudes, and wrote none. Hard masks may have another at every level.
        """
        if criterion:
            _check_same("criterion", self.criterion or "magnitude", criterion)


def _check_same(name: str, then: object, now: object) -> None:
    if then != now:
        raise ValueError(
            f"the checkpoint was written with {name}={then!r} but this run has {name}={now!r}: resume with the same "
            "value, or start a new run from the checkpoint's model"
        )


def load_method_state(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Load the tensors that a soft method saved with the masks; raises a ValueError if they are damaged."""
    return MaskSet.load_beside(Path(folder) / STATE_FILE)


def changed_message(folder: str | os.PathLike, what: str) -> str:
    """Return the error message for a folder whose files do not belong together."""
    return (
        f"{folder}: {what} that {STATE_FILE} was saved with; restore the file, or, if you changed it on purpose, "
        f"delete {STATE_FILE}: masks are then taken from the zeros"
    )
