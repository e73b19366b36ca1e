"""After a cut, the weights that are kept take over from those that are gone: every matrix is fitted anew, by least
squares, to what it computed before.

Layer-wise reconstruction as in "Optimal Brain Compression" (arXiv 2208.11580) and SparseGPT (arXiv 2301.00774), but
asymmetric, as for channels in arXiv 1707.06168: each matrix reads what the matrices fitted before it put out and aims
at what the uncut model computes from its own inputs, so that errors are made good and do not add up.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.trainer_pt_utils import find_batch_size

from ..masking.targets import is_layer, transposed_weights
from .least_squares import fit_masked

Forward = Callable[..., Tensor]


class _Enough(Exception):
    """The last matrix is fitted: what the model would do with its output is of no use."""


@dataclass
class Refit:
    """What a refit did. cut, fitted: by name of the weight, the squared error of the matrix's output before and after
    its fit, as a share of the variance that it should have; its input comes from matrices fitted before it."""

    cut: dict[str, float] = field(default_factory=dict)
    fitted: dict[str, float] = field(default_factory=dict)

    @property
    def mean_cut(self) -> float:
        """Mean over matrices, NaN where none was fitted."""
        return fmean(self.cut.values()) if self.cut else math.nan

    @property
    def mean_fitted(self) -> float:
        """Likewise."""
        return fmean(self.fitted.values()) if self.fitted else math.nan


@torch.no_grad()
def refit(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    inputs: Mapping[str, object],
) -> Refit:
    """Fit the weights that are not zero, and their biases, in place; in one forward pass, in float32 at least.

    The batch goes through the model twice side by side: its first half sees the uncut matrices, its second half the
    cut ones, each of which is fitted the moment its input is known. All other modules treat the rows of a batch alike.

    Fitted are the matrices of `fittable`; the others stay as they were cut, and so does one for which there are too
    few positions, or whose fit is no better than the cut (or not finite).

    Args:
        model: in eval mode, not wrapped.
        weights: those that were cut, by name, as `prunable_weights` gives them.
        before: their values before the cut, by name; may hold more.
        inputs: keyword arguments of one forward pass. Positions where `attention_mask` is 0 are not fitted to, where
            it has a place for every position of a matrix's input.

    Raises:
        ValueError: the model is in training mode, or `weights` or `before` are not of its layers.
    """
    if model.training:
        raise ValueError("refit needs a model in eval mode, else it would be fitted to dropout: call model.eval()")
    _check_weights(model, weights, before)
    calls = fittable(model, weights, inputs)
    if not calls:
        return Refit()
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    transposed, real = transposed_weights(model), inputs.get("attention_mask")
    done, rows, last = Refit(), find_batch_size(inputs), list(calls)[-1]

    def forward_of(name: str) -> Forward:
        module, original, weight = modules[name], modules[name].forward, weights[name]
        old = before[name].to(weight.dtype)
        if name in transposed:
            old, weight = old.T, weight.T  # views

        def halves(values: Tensor) -> Tensor:
            """Of a matrix that is not fitted: uncut for the first half, cut for the second."""
            if len(values) % 2:  # no input of rows, such as DeBERTa's embeddings of distances: cut for both
                return original(values)
            kept = weights[name].data
            try:
                weights[name].data = before[name].to(kept)
                first = original(values[: len(values) // 2])
            finally:
                weights[name].data = kept
            return torch.cat([first, original(values[len(values) // 2 :])])

        def forward(*given: Tensor, **named: Tensor) -> Tensor:
            (values,) = (*given, *named.values())
            with torch.autocast(values.device.type, enabled=False):  # which would keep a copy of the unfitted weight
                values = values.to(weight.dtype)
                if len(values) != 2 * rows * calls.get(name, 0):
                    return halves(values)
                own = values[len(values) // 2 :]
                wanted = linear(values[: len(values) // 2], old, module.bias)
                errors = _fit(weight, module.bias, _positions(own, real), _positions(wanted, real))
                if errors is not None:
                    done.cut[name], done.fitted[name] = errors
                if name == last:
                    raise _Enough
                return torch.cat([wanted, linear(own, weight, module.bias)])

        return forward

    with _replaced({modules[name]: forward_of(name) for name in weights}), contextlib.suppress(_Enough):
        model(**_of_rows(inputs, lambda rows: torch.cat([rows, rows])))
    return done


@torch.no_grad()
def fittable(model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: Mapping[str, object]) -> dict[str, int]:
    """Which matrices can be fitted, in the order of a forward pass: name -> rows of its input for one of `inputs`.

    Those of linear layers (also `Conv1D`) whose weight takes a gradient and that are used once, on an input that is
    the rows of the batch one after the other. Convolutions, layers shared between depths (ALBERT), tied matrices and
    projections that other things than rows pass as well (DeBERTa's of distances) are not among them.

    Args:
        model, weights, inputs: as in `refit`; one row of the inputs goes through the model, twice.
    """
    found: dict[str, int] = {}
    used: dict[str, int] = {}

    def forward_of(name: str, original: Forward) -> Forward:
        def forward(*given: Tensor, **named: Tensor) -> Tensor:
            (values,) = (*given, *named.values())
            used[name] = used.get(name, 0) + 1
            half = len(values) // 2
            if values.dim() > 1 and len(values) == 2 * half and torch.allclose(values[:half], values[half:]):
                found[name] = half
            return original(*given, **named)

        return forward

    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    asked = {
        n for n, weight in weights.items() if weight.requires_grad and weight.dim() == 2 and uses[id(weight)] == 1
    }
    with _replaced({modules[name]: forward_of(name, modules[name].forward) for name in asked}):
        model(**_of_rows(inputs, lambda rows: torch.cat([rows[:1], rows[:1]])))
    return {name: half for name, half in found.items() if used[name] == 1}


def _check_weights(model: nn.Module, weights: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> None:
    layers = {f"{name}.weight": module.weight for name, module in model.named_modules() if is_layer(module)}
    for name, weight in weights.items():
        if layers.get(name) is not weight:
            raise ValueError(
                f"{name} is no weight of a linear or convolution layer of {type(model).__name__}: give those that "
                "prunable_weights returns, under their names"
            )
        if name not in before:
            raise ValueError(f"before lacks {name}: copy every weight before it is cut")
        if before[name].shape != weight.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)} but {tuple(before[name].shape)} before the cut: copy every "
                "weight before it is cut"
            )


def _fit(weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """Change `weight` where it is not zero, and `bias`, so that they map `x` `(positions, in)` to `y` `(positions,
    out)`; returns the error before and after, as shares of the variance of `y`, or None where they are left alone."""
    now = weight.to(x.dtype)
    if len(x) < 2 * int(torch.count_nonzero(now, 1).max()):  # it would fit these positions alone
        return None
    variance = (y - y.mean(0)).square().sum()
    missing = y - linear(x, now, None if bias is None else bias.to(x.dtype))
    cut, fits_bias = missing.square().sum(), bias is not None and bias.requires_grad
    if fits_bias:  # it takes up the means, whatever the weights are
        middle, shift = x.mean(0), missing.mean(0)
        x, missing = x - middle, missing - shift
    gram, cross = x.T @ x, missing.T @ x
    delta = fit_masked(gram, cross, (now != 0).to(x.dtype))
    fitted = missing.square().sum() - 2 * (delta * cross).sum() + ((delta @ gram) * delta).sum()
    if not (variance > 0 and torch.isfinite(delta).all() and fitted <= cut):
        return None
    weight.add_(delta)
    if fits_bias:
        bias.add_(shift - delta @ middle)
    return float(cut / variance), max(float(fitted / variance), 0.0)


@contextlib.contextmanager
def _replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Inside, the modules compute something else."""
    kept = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in kept.items():
            del module.forward
            if own is not None:  # it had one of its own before, such as that of a wrapper
                module.forward = own


def _of_rows(inputs: Mapping[str, object], change: Callable[[Tensor], Tensor]) -> dict[str, object]:
    """The same inputs of other rows; what has no rows stays as it is."""
    rows = find_batch_size(inputs)
    has = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape[:1] == (rows,)}
    return {name: change(value) if name in has else value for name, value in inputs.items()}


def _positions(values: Tensor, real: Tensor | None) -> Tensor:
    """`(rows, positions, features)` -> `(those that are no padding, features)`, in float32 at least."""
    features = values.shape[-1]
    values = values.reshape(-1, features).to(torch.promote_types(values.dtype, torch.float32))
    return values[real.flatten().bool()] if real is not None and real.numel() == len(values) else values
