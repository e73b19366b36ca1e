"""The refit after a cut: least squares over the kept weights of each matrix, towards its output before the cut.

Layer-wise reconstruction as in "Optimal Brain Compression" (arXiv 2208.11580) and SparseGPT (arXiv 2301.00774), but
asymmetric, as for channels in arXiv 1707.06168: the input of a matrix comes from the refitted matrices before it, and
its target from the uncut model, so that later matrices correct the errors of earlier ones.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.trainer_pt_utils import find_batch_size

from ..masking.targets import is_layer, transposed_weights
from ..utils.wrappers import eager, plain_model
from .least_squares import solve_masked

Forward = Callable[..., Tensor]


class _LastRefitted(Exception):
    """Ends the forward pass after the last matrix, since nobody needs its output."""


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


@torch.no_grad()
def refit(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    run: Callable[[dict[str, Any]], Any] | None = None,
) -> Refit:
    """Refit the kept (non-zero) weights of all matrices, and their biases, in place.

    One forward pass does it, in float32 or better. The batch goes through the model twice, side by side: its first
    half sees the uncut matrices, its second half the cut ones. Each matrix is refitted as soon as its input is there.
    The other modules must treat the rows of a batch independently.

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
    model = plain_model(model)
    if model.training:
        raise ValueError(
            "refit needs a model in eval mode, because dropout would spoil the targets: call model.eval()"
        )
    _check_weights(model, weights, before)
    multiples = refittable(model, weights, inputs, run)
    if not multiples:
        return Refit()
    modules: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    transposed, real = transposed_weights(model), inputs.get("attention_mask")
    result, rows, last = Refit(), find_batch_size(inputs), list(multiples)[-1]

    def forward_of(name: str) -> Forward:
        module, original = modules[name], modules[name].forward
        weight: Tensor = weights[name]
        uncut = before[name].to(weight.dtype)
        if name in transposed:
            uncut, weight = uncut.T, weight.T  # views

        def without_refit(values: Tensor) -> Tensor:
            """Compute the first half with the uncut weight and the second half with the cut one."""
            if len(values) % 2:  # not rows of the batch, such as DeBERTa's embeddings of distances: cut for both
                return original(values)
            cut = weights[name].data
            try:
                weights[name].data = before[name].to(cut)
                first = original(values[: len(values) // 2])
            finally:
                weights[name].data = cut
            return torch.cat([first, original(values[len(values) // 2 :])])

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            (values,) = (*args, *kwargs.values())
            with torch.autocast(values.device.type, enabled=False):  # it would cache the weight before the refit
                values = values.to(weight.dtype)
                if len(values) != 2 * rows * multiples.get(name, 0):
                    return without_refit(values)
                own = values[len(values) // 2 :]
                target = linear(values[: len(values) // 2], uncut, module.bias)
                errors = _refit_matrix(weight, module.bias, _positions(own, real), _positions(target, real))
                if errors is not None:
                    result.cut[name], result.refitted[name] = errors
                if name == last:
                    raise _LastRefitted
                return torch.cat([target, linear(own, weight, module.bias)])

        return forward

    with _replaced({modules[name]: forward_of(name) for name in weights}), contextlib.suppress(_LastRefitted):
        _run(model, run, _take_rows(inputs, [*range(rows), *range(rows)]))
    return result


@torch.no_grad()
def refittable(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    inputs: Mapping[str, Any],
    run: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, int]:
    """Find the matrices that can be refitted, in the order of a forward pass.

    They are the weights of linear layers (also `Conv1D`) that take a gradient and run once per forward pass, on an
    input that is the rows of the batch one after the other. This excludes convolutions, layers shared between depths
    (ALBERT), tied matrices, and projections that also get other inputs (DeBERTa's of distances).

    Args:
        model: in eval mode.
        weights: the weights to look at, by name.
        inputs: keyword arguments of one forward pass; the first row goes through the model, twice.
        run: passes a batch through the model; by default `model(**inputs)`.

    Returns:
        name -> length of its input's first dimension per row of the batch (1, or the choices of a multiple choice).
    """
    model = plain_model(model)
    multiples: dict[str, int] = {}
    uses: dict[str, int] = {}

    def forward_of(name: str, original: Forward) -> Forward:
        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            (values,) = (*args, *kwargs.values())
            uses[name] = uses.get(name, 0) + 1
            half = len(values) // 2
            if values.dim() > 1 and len(values) == 2 * half and torch.allclose(values[:half], values[half:]):
                multiples[name] = half
            return original(*args, **kwargs)

        return forward

    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    forwards: dict[nn.Module, Forward] = {}
    for name, weight in weights.items():
        if weight.requires_grad and weight.dim() == 2 and owners[id(weight)] == 1:
            module = model.get_submodule(name.removesuffix(".weight"))
            forwards[module] = forward_of(name, module.forward)
    with _replaced(forwards):
        _run(model, run, _take_rows(inputs, [0, 0]))
    return {name: half for name, half in multiples.items() if uses[name] == 1}


@torch.no_grad()
def positions_of_row(
    model: nn.Module, inputs: Mapping[str, Any], run: Callable[[dict[str, Any]], Any] | None = None
) -> int:
    """Measure how many positions (tokens, patches, frames) one row has in the layer that gets the most.

    Layers whose input is not made of the rows of the batch (DeBERTa's of distances) do not count.

    Args:
        model: in eval mode.
        inputs: as in `refittable`; the first row goes through the model, twice.
        run: passes a batch through the model; by default `model(**inputs)`.
    """
    model, most = plain_model(model), 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal most
        half = len(output) // 2
        if len(output) == 2 * half and torch.allclose(output[:half], output[half:], equal_nan=True):
            features = output.shape[1 if isinstance(module, nn.Conv2d) else -1]
            most = max(most, output[:half].numel() // features)

    hooks = [module.register_forward_hook(count) for module in model.modules() if is_layer(module)]
    try:
        with eager():
            _run(model, run, _take_rows(inputs, [0, 0]))
    finally:
        for hook in hooks:
            hook.remove()
    return most


def _check_weights(model: nn.Module, weights: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> None:
    layers = {f"{name}.weight": module.weight for name, module in model.named_modules() if is_layer(module)}
    for name, weight in weights.items():
        if layers.get(name) is not weight:
            raise ValueError(
                f"{name} is no weight of a linear or convolution layer of {type(model).__name__}: pass the weights of "
                "prunable_weights under their names"
            )
        if name not in before:
            raise ValueError(f"before lacks {name}: copy every weight before it is cut")
        if before[name].shape != weight.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)} but {tuple(before[name].shape)} before the cut: copy every "
                "weight before it is cut"
            )


def _refit_matrix(weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """Change the kept entries of `weight`, and `bias`, so that they map `x` (positions, in) to `y` (positions, out).

    Returns the errors before and after as shares of the variance of `y`, or None if nothing was changed.
    """
    now = weight.to(x.dtype)
    if len(x) < 2 * int(torch.count_nonzero(now, 1).max()):  # so few positions would be overfitted
        return None
    variance = (y - y.mean(0)).square().sum()
    missing = y - linear(x, now, None if bias is None else bias.to(x.dtype))
    cut = missing.square().sum()
    changes_bias = bias is not None and bias.requires_grad
    if changes_bias:  # it corrects the means, whatever the weights are
        center, shift = x.mean(0), missing.mean(0)
        x, missing = x - center, missing - shift
    gram, cross = x.T @ x, missing.T @ x
    delta = solve_masked(gram, cross, (now != 0).to(x.dtype))
    refitted = missing.square().sum() - 2 * (delta * cross).sum() + ((delta @ gram) * delta).sum()
    if not (variance > 0 and torch.isfinite(delta).all() and refitted <= cut):
        return None
    weight.add_(delta)
    if bias is not None and changes_bias:
        bias.add_(shift - delta @ center)
    return float(cut / variance), max(float(refitted / variance), 0.0)


@contextlib.contextmanager
def _replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Replace the forwards of modules inside the context."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        with eager():
            yield
    finally:
        for module, original in own.items():
            del module.forward
            if original is not None:  # the instance had its own, such as that of a wrapper
                module.forward = original


def _run(model: nn.Module, run: Callable[[dict[str, Any]], Any] | None, inputs: dict[str, Any]) -> None:
    if run is None:
        model(**inputs)
    else:
        run(inputs)


def _take_rows(inputs: Mapping[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Return a batch of some rows, one by one as often as they are chosen; what has no rows stays as it is."""
    rows = find_batch_size(inputs)

    def take(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: take(entry) for name, entry in value.items()}
        if isinstance(value, Tensor):
            return value[chosen] if value.shape[:1] == (rows,) else value
        if not isinstance(value, list | tuple):
            return value
        if any(isinstance(entry, Mapping | Tensor | list | tuple) for entry in value):
            return type(value)(take(entry) for entry in value)
        return type(value)(value[row] for row in chosen) if len(value) == rows else value

    return take(inputs)


def _positions(values: Tensor, real: Tensor | None) -> Tensor:
    """Reshape `(rows, positions, features)` to `(real positions, features)`, in float32 or better."""
    features = values.shape[-1]
    values = values.reshape(-1, features).to(torch.promote_types(values.dtype, torch.float32))
    return values[real.flatten().bool()] if real is not None and real.numel() == len(values) else values
