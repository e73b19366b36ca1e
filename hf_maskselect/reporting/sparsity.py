"""The sparsity report: zeros counted in the weights themselves, per tensor and over the model."""

import os
from dataclasses import dataclass

import torch
from torch import nn

from ..masking.targets import prunable_weights
from ..storage.models import skeleton
from ..storage.state import PruningState
from ..storage.weights import check_present, saved_tensors
from ..utils.tables import text_table
from ..utils.wrappers import plain_model


@dataclass(frozen=True)
class TensorReport:
    """Zeros and size of one tensor; `prunable` says whether it counts towards the target."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    total: int
    prunable: bool


@dataclass(frozen=True)
class SparsityReport:
    """Zero counts of a model or of a saved folder."""

    tensors: tuple[TensorReport, ...]

    @property
    def prunable_zeros(self) -> int:
        """Zeros among the prunable weights."""
        return sum(t.zeros for t in self.tensors if t.prunable)

    @property
    def prunable_total(self) -> int:
        """Number of prunable weights."""
        return sum(t.total for t in self.tensors if t.prunable)

    @property
    def zeros(self) -> int:
        """Zeros in the whole model."""
        return sum(t.zeros for t in self.tensors)

    @property
    def total(self) -> int:
        """Number of parameters of the whole model."""
        return sum(t.total for t in self.tensors)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the prunable weights, in [0, 1]."""
        return self.prunable_zeros / self.prunable_total

    def __str__(self) -> str:
        rows = [_row(t.name, "x".join(map(str, t.shape)), t.zeros, t.total) for t in self.tensors if t.prunable]
        rows.append(_row("all prunable weights", "", self.prunable_zeros, self.prunable_total))
        rows.append(_row("whole model", "", self.zeros, self.total))
        return text_table(["tensor", "shape", "zeros", "of", "sparsity"], rows)


def sparsity_report(
    model_or_path: nn.Module | str | os.PathLike,
    target_modules: list[str] | None = None,
    exclude_modules: list[str] | None = None,
) -> SparsityReport:
    """Count the zeros of a model in memory or of a saved folder, whose tensors are read one at a time.

    The pruning state of a folder names its prunable tensors. Without a state they are those of
    [`prunable_weights`] for the model, or for the model that the folder's `config.json` describes.

    Args:
        model_or_path: a model, or a folder with safetensors weights.
        target_modules: modules to count as prunable; ignored if there is a pruning state.
        exclude_modules: modules to leave out; ignored if there is a pruning state.

    Raises:
        ValueError: the folder holds no safetensors weights.
    """
    model_or_path = plain_model(model_or_path)
    if isinstance(model_or_path, nn.Module):
        names = {id(w): n for n, w in prunable_weights(model_or_path, target_modules, exclude_modules).items()}
        named = ((names.get(id(p), n), p) for n, p in model_or_path.named_parameters())
        return SparsityReport(tuple(_count(n, p.detach(), id(p) in names) for n, p in named))
    state = PruningState.find(model_or_path)
    if state is not None:
        prunable = set(state.masks)
    else:
        prunable = set(prunable_weights(skeleton(model_or_path), target_modules, exclude_modules))
    tensors = tuple(_count(name, t, name in prunable) for name, t in saved_tensors(model_or_path))
    check_present(model_or_path, prunable, (tensor.name for tensor in tensors))
    return SparsityReport(tensors)


def _count(name: str, tensor: torch.Tensor, prunable: bool) -> TensorReport:
    zeros = tensor.numel() - int(torch.count_nonzero(tensor))
    return TensorReport(name, tuple(tensor.shape), zeros, tensor.numel(), prunable)


def _row(name: str, shape: str, zeros: int, total: int) -> list[str]:
    return [name, shape, f"{zeros:,}", f"{total:,}", f"{zeros / total:.4f}"]
