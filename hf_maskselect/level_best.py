"""The best weights of a level, by the selection split."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .files import replacing

FILE = "level_best.safetensors"


class LevelBest:
    """Keeps the best trained weights of the current level on disk (in `folder`, replaced atomically).

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
        with replacing(self._path) as temporary:
            save_file(weights, temporary, metadata={"level": str(level), "score": repr(score)})
        return True

    def _known(self) -> dict[str, str]:
        if not self._path.is_file():
            return {}
        with safe_open(self._path, framework="pt") as file:
            return file.metadata()

    @torch.no_grad()
    def restore(self, level: int, model: nn.Module) -> None:
        """Load the weights kept for `level` into the model; without any (every score was NaN) it stays as it is."""
        if self._known().get("level") != str(level):
            return
        parameters = dict(model.named_parameters())
        for name, weight in load_file(self._path).items():
            parameters[name].copy_(weight)

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
