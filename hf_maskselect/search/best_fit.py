"""What the fit of the best candidate so far has made of the weights, waiting on disk: no winner is fitted twice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..surgery.refit import Refit
from .results import rank_of


class FitErrors(NamedTuple):
    """Of one fit: mean errors of the matrices' outputs as cut and as fitted (shares of their variance), and how many
    were fitted."""

    cut: float
    fitted: float
    matrices: int


def errors_of(fit: Refit) -> FitErrors:
    """The same of a fit at hand."""
    return FitErrors(fit.mean_cut_error, fit.mean_refit_error, len(fit.refitted))


class BestFit:
    """One file for one search.

    Args:
        folder: where it lies while the search runs.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "fit.safetensors"
        self._rank = (math.inf, math.inf)

    def offer(self, index: int, score: float, fit: Refit, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights that the fit of candidate `index` has changed, if none so far scored better."""
        rank = rank_of(score, index)
        if rank < self._rank:
            self._rank = rank
            told = json.dumps([index, *errors_of(fit)])
            whole = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(whole, self._path, metadata={"fit": told})

    def find(self, index: int) -> FitErrors | None:
        """Of the fit that waits here, if it is that of candidate `index`."""
        if not self._path.is_file():
            return None
        with safe_open(self._path, framework="pt") as file:
            kept, *errors = json.loads(file.metadata()["fit"])
        return FitErrors(*errors) if kept == index else None

    def load(self) -> dict[str, Tensor]:
        """Its weights, by name."""
        return load_file(self._path)
