"""The best weights of a level, by the selection split."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..utils.digests import header_checksum, weights_digest
from ..utils.files import replacing

FILE = "_level_best.safetensors"
_REMEDY = "restore it, or resume from another checkpoint"


class LevelBest:
    """Keeps the best trained weights of the current level on disk (in `folder`, replaced atomically), with the model's
    buffers, such as the running statistics of a batch norm.

    On disk, so that it costs no memory and a resumed run finds what the level has seen so far.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._path = Path(folder) / FILE

    def consider(self, level: int, score: float, model: nn.Module) -> bool:
        """Keep the weights if `score` (lower is better) beats the level's best so far; says whether it did."""
        if math.isnan(score):
            return False
        known = self._known()
        if known.get("level") == str(level) and float(known["score"]) <= score:
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        weights = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        # Copies: buffers may share memory, which the file format does not know.
        weights |= {n: b.detach().clone(memory_format=torch.contiguous_format) for n, b in model.named_buffers()}
        with replacing(self._path) as temporary:
            told = {"level": str(level), "score": repr(score), "weights": weights_digest(weights)}
            save_file(weights, temporary, metadata=told | {"checksum": header_checksum(told)})
        return True

    def _known(self) -> dict[str, str]:
        """What the file says of itself; empty without one.

        Raises:
            ValueError: the file is damaged.
        """
        if not self._path.is_file():
            return {}
        try:
            with safe_open(self._path, framework="pt") as file:
                told = dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self._path} cannot be read ({error}): {_REMEDY}") from error
        if told.pop("checksum", None) != header_checksum(told):
            raise ValueError(f"{self._path} is damaged: its header does not match its checksum; {_REMEDY}")
        return told

    @torch.no_grad()
    def restore(self, level: int, model: nn.Module) -> bool:
        """Load the weights kept for `level` into the model; without any (every score was NaN) it stays as it is, as do
        buffers that an earlier version has not kept.

        Returns:
            whether there were any.
        """
        told = self._known()
        if told.get("level") != str(level):
            return False
        weights = load_file(self._path)
        if weights_digest(weights) != told["weights"]:
            raise ValueError(f"{self._path} is damaged: its weights do not match their digest; {_REMEDY}")
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, weight in weights.items():
            own[name].copy_(weight)
        return True

    def copy_to(self, folder: str | os.PathLike) -> None:
        """Put the file beside a checkpoint, so that a run resumed from there knows what this level has seen."""
        if self._path.is_file():
            shutil.copyfile(self._path, Path(folder) / FILE)

    def copy_from(self, folder: str | os.PathLike) -> None:
        """Take up what a checkpoint knows."""
        self.forget()
        if (Path(folder) / FILE).is_file():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder) / FILE, self._path)

    def forget(self) -> None:
        """Remove the file (the level is over)."""
        self._path.unlink(missing_ok=True)
