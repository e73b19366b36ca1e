"""Weights that wait on disk: one store, the best weights of a level, and the best refit of a search."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..masking.tensor_files import TensorFile
from ..surgery.refit import Refit
from ..utils.digests import header_checksum, weights_digest
from ..utils.files import replacing
from ..utils.reading import check_file, parse_json, typed
from .identity import Parts, changed_parts
from .results import order_of

_NOTHING: Parts = {}


class WeightStore:
    """Safetensors files of weights in `folder`, each written in one rename and checked when it is read.

    The header of a file holds text fields of its user, a digest of the weights and a checksum of the header. The
    errors of damaged files end with `remedy`.
    """

    def __init__(self, folder: str | os.PathLike, remedy: str) -> None:
        self._folder, self._remedy = Path(folder), remedy

    def path(self, name: str) -> Path:
        """Return the path of the file `name`."""
        return self._folder / f"{name}.safetensors"

    def header(self, name: str) -> dict[str, str]:
        """Return the fields of a file's header; empty without a file.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(name)
        if not path.is_file():
            return {}
        fields = TensorFile(path, "weights", self._remedy).metadata
        if fields.pop("checksum", None) != header_checksum(fields):
            raise ValueError(f"{path} is damaged, its header does not match its checksum: {self._remedy}")
        return fields

    def value(self, name: str, field: str, hint: Any) -> Any:
        """Return a header field that holds JSON of the type `hint`, as `typed` takes it; None without the field.

        Raises:
            ValueError: the file is damaged, or the field holds something else.
        """
        text, where = self.header(name).get(field), f"{self.path(name)}: {field}"
        if text is None:
            return None
        return typed(parse_json(text, where, self._remedy), hint, where, self._remedy)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the weights of a file.

        Raises:
            ValueError: the file is damaged or not there.
        """
        path, expected = self.path(name), self.header(name).get("weights")
        weights = TensorFile(path, "weights", self._remedy).tensors()
        if weights_digest(weights) != expected:
            raise ValueError(f"{path} is damaged, its weights do not match their digest: {self._remedy}")
        return weights

    def write(self, name: str, weights: Mapping[str, Tensor], fields: Mapping[str, str]) -> None:
        """Write weights and header fields, in place of an earlier file of that name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        contiguous = {n: weight.detach().contiguous() for n, weight in weights.items()}
        header = {**fields, "weights": weights_digest(contiguous)}
        with replacing(self.path(name)) as temporary:
            save_file(contiguous, temporary, metadata=header | {"checksum": header_checksum(header)})


class LevelBest:
    """The best trained weights and buffers of the current level, by their score on the held-out rows.

    They are on disk in `folder`, so that they need no memory and a resumed run knows the level's best so far.
    """

    NAME = "_level_best"

    def __init__(self, folder: str | os.PathLike) -> None:
        self._store = WeightStore(folder, "restore it, or resume from another checkpoint")
        self._path = self._store.path(self.NAME)

    def consider(self, level: int, score: float, model: nn.Module, masks: str = "", scoring: Parts = _NOTHING) -> bool:
        """Keep the weights if `score` (lower is better) beats the level's best so far; return whether it did.

        masks: digest of those in force; scoring: identity of what the score depends on.
        """
        if math.isnan(score):
            return False
        best = self._store.value(self.NAME, "score", float)
        if best is not None and self._is_of(level, masks) and best <= score:
            return False
        weights: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # Copies: buffers may share memory, which the file format cannot express.
        weights |= {n: b.detach().clone(memory_format=torch.contiguous_format) for n, b in model.named_buffers()}
        fields = {"level": str(level), "score": repr(score), "masks": masks, "scoring": json.dumps(dict(scoring))}
        self._store.write(self.NAME, weights, fields)
        return True

    def _is_of(self, level: int, masks: str) -> bool:
        """Whether the file is of this level and these masks; earlier versions wrote no masks."""
        fields = self._store.header(self.NAME)
        return fields.get("level") == str(level) and fields.get("masks", masks) == masks

    def check_scoring(self, scoring: Parts) -> None:
        """Raise a ValueError if the score in the file cannot be compared with those of a run with this identity."""
        then = self._store.value(self.NAME, "scoring", dict[str, str]) or {}
        if changed := changed_parts(then, scoring):
            raise ValueError(
                f"{self._path} was chosen with other {', '.join(changed)}, so its score does not compare with those "
                "of this run: resume with the same, or set level_eval_steps=0"
            )

    @torch.no_grad()
    def restore(self, level: int, model: nn.Module, masks: str = "") -> bool:
        """Load the best weights of `level` into the model; return False if there are none (every score was NaN).

        Tensors that are not in the file keep their values: earlier versions wrote no buffers.
        """
        if not self._is_of(level, masks):
            return False
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights = self._store.load(self.NAME)
        for name, weight in weights.items():
            if name not in own or own[name].shape != weight.shape:
                raise ValueError(f"{self._path}: {name} is not of this model: start the run again")
        for name, weight in weights.items():
            own[name].copy_(weight)
        return True

    def digests(self) -> dict[str, str]:
        """Return {name of the file: digest of its weights and of what its header says}; empty without a file."""
        fields = self._store.header(self.NAME)
        return {self._path.name: header_checksum(fields)} if fields else {}

    def check(self, expected: Mapping[str, str]) -> None:
        """Raise a ValueError if there is a file, but not the one whose digest `expected` holds by its name."""
        for name, digest in self.digests().items():
            if expected.get(name) != digest:
                raise ValueError(
                    f"{self._path} is not the file that the checkpoint was saved with, but one of another level or "
                    "run: restore it, or resume from another checkpoint"
                )

    def copy_to(self, folder: str | os.PathLike) -> None:
        """Copy the file into a checkpoint, so that a run resumed from there knows the level's best so far."""
        if self._path.is_file():
            shutil.copyfile(check_file(self._path), Path(folder) / self._path.name)

    def copy_from(self, folder: str | os.PathLike) -> None:
        """Take the file of a checkpoint in place of the present one."""
        if not (Path(folder) / self._path.name).is_file():
            self.forget()
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as temporary:
            shutil.copyfile(check_file(Path(folder) / self._path.name), temporary)

    def forget(self) -> None:
        """Remove the file: the level is over."""
        self._path.unlink(missing_ok=True)


class RefitErrors(NamedTuple):
    """Mean errors of matrices' outputs after cut and refit (shares of their variance); how many were refitted."""

    cut: float
    refit: float
    matrices: int

    @classmethod
    def of(cls, done: Refit) -> RefitErrors:
        """Return the errors of a refit."""
        return cls(done.mean_cut_error, done.mean_refit_error, len(done.refitted))


class BestRefit:
    """The refitted weights of the best candidate that this process has tried, so that the winner's refit is reused.

    They are in `folder`, the temporary folder of the search.
    """

    NAME = "fit"

    def __init__(self, folder: Path) -> None:
        self._store = WeightStore(folder, "start the run again")
        self._order = (True, math.inf, math.inf)

    def offer(self, index: int, score: float, done: Refit, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights that the refit of candidate `index` has changed, if no earlier candidate is better."""
        if order_of(score, index) < self._order:
            self._order = order_of(score, index)
            self._store.write(self.NAME, weights, {"fit": json.dumps([index, *RefitErrors.of(done)])})

    def find(self, index: int) -> RefitErrors | None:
        """Return the errors of candidate `index` if its refit is kept here, else None."""
        kept, *errors = self._store.value(self.NAME, "fit", list[float]) or [None]
        return RefitErrors(*errors) if kept == index else None

    def load(self) -> dict[str, Tensor]:
        """Return the refitted weights, by name."""
        return self._store.load(self.NAME)
