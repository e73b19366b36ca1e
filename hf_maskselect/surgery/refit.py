"""The refit after a cut: least squares over the kept weights of each matrix, towards its output before the cut.

Layer-wise reconstruction as in "Optimal Brain Compression" (arXiv 2208.11580) and SparseGPT (arXiv 2301.00774), but
asymmetric, as for channels in arXiv 1707.06168: the input of a matrix comes from the refitted matrices before it, and
its target from the uncut model, so that later matrices correct the errors of earlier ones.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..masking.targets import transposed_weights
from ..utils.wrappers import plain_model
from .dense_outputs import DenseOutputs, dense_outputs
from .least_squares import solve_masked
from .passes import Forward, LastLayer, Run, all_rows, replaced, run_batch


@dataclass
class Refit:
    """Output errors of each matrix, by the name of its weight: `cut` before its refit, `refitted` after it.

    An error is squared, and a share of the variance of the target. The input comes from refitted matrices.
    """

    cut: dict[str, float] = field(default_factory=dict)
    refitted: dict[str, float] = field(default_factory=dict)

    @property
    def mean_cut_error(self) -> float:
        """Mean error after the cut over all refitted matrices, NaN if there are none."""
        return fmean(self.cut.values()) if self.cut else math.nan

    @property
    def mean_refit_error(self) -> float:
        """Mean error after the refit over all refitted matrices, NaN if there are none."""
        return fmean(self.refitted.values()) if self.refitted else math.nan


def refit(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    run: Run | None = None,
) -> Refit:
    """Refit the kept (non-zero) weights of all matrices, and their biases, in place.

    Two forward passes do it, in the dtype that the model computes in: one of the uncut model, of which the outputs at
    a sample of positions are kept (`DenseOutputs`), and one of the cut model, in which each matrix is refitted, in
    float32 or better, as soon as its input is there. The other modules must treat the rows of a batch independently.
    Padding does not pass through the matrices: it has no say in the model either.

    Matrices that are not in `refittable` stay as they were cut. So does a matrix with too few positions, and one whose
    refit is not finite or no better than the cut.

    Args:
        model: in eval mode.
        weights: the weights that were cut, by name, as `prunable_weights` returns them.
        before: their values before the cut, by name; may hold more.
        inputs: keyword arguments of one forward pass. Positions where `attention_mask` is 0 are left out, if the mask
            has an entry for every position of a matrix's input. Values may be nested.
        run: passes a batch through the model; by default `model(**inputs)`.

    Raises:
        ValueError: the model is in training mode, or `weights` or `before` do not belong to its layers.
    """
    return refit_to(dense_outputs(model, weights, before, inputs, run), model, weights)


@torch.no_grad()
def refit_to(dense: DenseOutputs, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Refit:
    """Refit the kept weights as `refit` does, towards outputs that may serve for other cuts of the model, too."""
    model = plain_model(model)
    transposed, result, last = transposed_weights(model), Refit(), next(reversed(dense.outputs), "")
    seen: _Input | None = None  # layers such as query, key and value read the same tensor

    def forward_of(name: str, module: Any) -> Forward:
        weight, original = weights[name].T if name in transposed else weights[name], module.forward

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            nonlocal seen
            (values,) = (*args, *kwargs.values())
            if len(values) != dense.rows[name]:
                return original(values)
            with torch.autocast(values.device.type, enabled=False):
                if seen is None or not seen.is_of(values):
                    seen = _Input(values, dense.positions.of(values, weight.shape[1]))
                errors = _refit_matrix(weight, module.bias, seen, dense.outputs[name])
            if errors is not None:
                result.cut[name], result.refitted[name] = errors
            if name == last:
                raise LastLayer
            return dense.positions.apply(original, values)

        return forward

    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in dense.outputs}
    forwards = {module: forward_of(name, module) for name, module in modules.items()}
    if forwards:
        with replaced(forwards), contextlib.suppress(LastLayer):
            run_batch(model, dense.run, all_rows(dense.inputs))
    return result


class _Input:
    """The input of a matrix at the positions of a refit, in float32 or better, and its Gram matrices."""

    def __init__(self, values: Tensor, sampled: Tensor) -> None:
        self._values, self._version = values, _version_of(values)
        self.x = sampled.to(torch.promote_types(sampled.dtype, torch.float32))
        self.mean = self.x.mean(0)
        self._products: dict[bool, tuple[Tensor, Tensor]] = {}

    def is_of(self, values: Tensor) -> bool:
        """Whether it was made from this tensor, which nobody has changed since."""
        return values is self._values and self._version == _version_of(values) >= 0

    def products(self, centered: bool) -> tuple[Tensor, Tensor]:
        """Return the input, less its mean if `centered`, and its Gram matrix."""
        if centered not in self._products:
            x = self.x - self.mean if centered else self.x
            self._products[centered] = x, x.T @ x
        return self._products[centered]


def _version_of(values: Tensor) -> int:
    """Return a number that grows at every change in place; -1 for tensors of `inference_mode`, which have none."""
    return -1 if values.is_inference() else values._version


def _refit_matrix(weight: Tensor, bias: Tensor | None, own: _Input, target: Tensor) -> tuple[float, float] | None:
    """Change the kept entries of `weight`, and `bias`, so that they map `own.x` (positions, in) to `target`.

    Returns the errors before and after as shares of the variance of the target, or None if nothing was changed.
    """
    now, y = weight.to(own.x.dtype), target.to(own.x.dtype)
    if len(y) < 2 * int(torch.count_nonzero(now, 1).max()):  # so few positions would be overfitted
        return None
    variance = (y - y.mean(0)).square().sum()
    missing = y - linear(own.x, now, None if bias is None else bias.to(own.x.dtype))
    cut = missing.square().sum()
    changes_bias = bias is not None and bias.requires_grad  # it corrects the means, whatever the weights are
    x, gram = own.products(changes_bias)
    if changes_bias:
        shift = missing.mean(0)
        missing = missing - shift
    cross = missing.T @ x
    delta = solve_masked(gram, cross, (now != 0).to(x.dtype))
    refitted = missing.square().sum() - 2 * (delta * cross).sum() + ((delta @ gram) * delta).sum()
    if not (variance > 0 and torch.isfinite(delta).all() and refitted <= cut):
        return None
    weight.add_(delta)
    if bias is not None and changes_bias:
        bias.add_(shift - delta @ own.mean)
    return float(cut / variance), max(float(refitted / variance), 0.0)
