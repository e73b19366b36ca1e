"""What is written beside the weights, and how a saved folder is checked against it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..masking.maskset import MaskSet
from ..utils.files import replacing
from .weights import check_unpacked, check_weights, config_digest

STATE_FILE = "pruning_state.safetensors"


_FIELDS = {"method": str, "pattern": str, "sparsity": float, "step": int, "level": int, "seed": int, "start": float}
_TEXTS = ("architecture", "weights", "config")


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


def changed(folder: str | os.PathLike, what: str) -> str:
    """The sentence for a folder whose files do not belong together."""
    return (
        f"{folder}: {what} that {STATE_FILE} was saved with; restore the file, or, if it was changed on purpose, "
        f"delete {STATE_FILE}: masks are then taken from the zeros"
    )
