"""After a cut, the weights that are kept take over from those that are gone: every matrix is fitted anew, by least
squares, to what it computed before.

Layer-wise reconstruction as in "Optimal Brain Compression" (arXiv 2208.11580) and SparseGPT (arXiv 2301.00774), but
asymmetric, as for channels in arXiv 1707.06168: each matrix reads what the matrices fitted before it put out and aims
at what the uncut model computes from its own inputs, so that errors are made good and do not add up.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.trainer_pt_utils import find_batch_size

from .masking.least_squares import fit_masked
from .masking.targets import transposed_weights

Forward = Callable[[Tensor], Tensor]
MOST_POSITIONS = 1 << 14  # tokens of the batch, padding too: they pass the model at once, twice


@dataclass
class Refit:
    """What a refit did. cut, fitted: by name of the weight, the error of the matrix's output, right after the cut and
    after the fit, as a share of the variance that it should have."""

    cut: dict[str, float] = field(default_factory=dict)
    fitted: dict[str, float] = field(default_factory=dict)

    @property
    def mean_cut(self) -> float:
        """Mean over matrices."""
        return statistics.mean(self.cut.values())

    @property
    def mean_fitted(self) -> float:
        """Likewise."""
        return statistics.mean(self.fitted.values())


@torch.no_grad()
def refit(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    inputs: Mapping[str, object],
) -> Refit:
    """Fit the weights that are not zero, and their biases, in place; in one forward pass.

    The batch goes through the model twice side by side: its first half sees the uncut matrices, its second half the
    cut ones, each of which is fitted the moment its input is known. All other modules treat the rows of a batch alike.

    Fitted are linear layers (also `Conv1D`) whose weight takes a gradient and that are used once in a forward pass, on
    one input for every row; convolutions and layers shared between depths (ALBERT) stay as they were cut.

    Args:
        model: in eval mode, not wrapped.
        weights: those that were cut, by name.
        before: their values before the cut, by name; may hold more.
        inputs: keyword arguments of one forward pass, of which so many rows are used that their `input_ids` are no
            more than `MOST_POSITIONS`. Positions where `attention_mask` is 0 are not fitted to.
    """
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    fits = {name for name, weight in weights.items() if weight.requires_grad and weight.dim() == 2}
    fits &= _used_once(model, {name: modules[name] for name in fits}, _of_rows(inputs, lambda rows: rows[:2]))
    if "input_ids" in inputs:
        most = max(1, MOST_POSITIONS // inputs["input_ids"].shape[1])
        inputs = _of_rows(inputs, lambda rows: rows[:most])
    transposed, real = transposed_weights(model), inputs.get("attention_mask")
    done, rows = Refit(), find_batch_size(inputs)

    def forward_of(name: str) -> Forward:
        weight, bias, old = weights[name], modules[name].bias, before[name]
        weight, old = (weight.T, old.T) if name in transposed else (weight, old)  # views

        def forward(values: Tensor) -> Tensor:
            wanted = linear(values[:rows], old, bias)
            x, y = _positions(values[rows:], real), _positions(wanted, real)
            done.cut[name], done.fitted[name] = _fit(weight, bias, x, y)
            return torch.cat([wanted, linear(values[rows:], weight, bias)])

        return forward

    with _replaced({modules[name]: forward_of(name) for name in fits}):
        model(**_of_rows(inputs, lambda rows: torch.cat([rows, rows])))
    return done


def _of_rows(inputs: Mapping[str, object], change: Callable[[Tensor], Tensor]) -> dict[str, object]:
    """The same inputs of other rows; what has no rows stays as it is."""
    rows = find_batch_size(inputs)
    has = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape[:1] == (rows,)}
    return {name: change(value) if name in has else value for name, value in inputs.items()}


def _fit(weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Change `weight` where it is not zero, and `bias`, so that they map `x` `(positions, in)` to `y` `(positions,
    out)`; returns the error before and after, as shares of the variance of `y`."""
    variance = (y - y.mean(0)).square().sum().clamp_min(torch.finfo(y.dtype).tiny)
    now = weight.to(x.dtype)
    missing = y - linear(x, now, None if bias is None else bias.to(x.dtype))
    cut, fits_bias = missing.square().sum(), bias is not None and bias.requires_grad
    if fits_bias:  # it takes up the means, whatever the weights are
        middle, shift = x.mean(0), missing.mean(0)
        x, missing = x - middle, missing - shift
    gram, cross = x.T @ x, missing.T @ x
    delta = fit_masked(gram, cross, (now != 0).to(x.dtype))
    fitted = missing.square().sum() - 2 * (delta * cross).sum() + ((delta @ gram) * delta).sum()
    weight.add_(delta)
    if fits_bias:
        bias.add_(shift - delta @ middle)
    return float(cut / variance), float(fitted / variance)


def _used_once(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, object]) -> set[str]:
    """Names of the modules that a forward pass calls once, with one input for every row."""
    rows, calls = find_batch_size(inputs), dict.fromkeys(modules, 0)

    def forward_of(name: str) -> Forward:
        original = modules[name].forward

        def forward(values: Tensor) -> Tensor:
            calls[name] += 1 if len(values) == rows and values.dim() > 1 else 2
            return original(values)

        return forward

    with _replaced({module: forward_of(name) for name, module in modules.items()}):
        model(**inputs)
    return {name for name, count in calls.items() if count == 1}


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


def _positions(values: Tensor, real: Tensor | None) -> Tensor:
    """`(rows, positions, features)` -> `(those that are no padding, features)`, in float32 at least."""
    if real is not None and real.shape == values.shape[:-1]:
        values = values[real.bool()]
    return values.flatten(0, -2).to(torch.promote_types(values.dtype, torch.float32))
