"""Forward passes in which layers are watched, or compute something else."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from ..masking.targets import is_layer
from ..utils.wrappers import eager, plain_model

Forward = Callable[..., Tensor]
Run = Callable[[dict[str, Any]], Any]


class LastLayer(Exception):
    """Ends a forward pass after the last layer that matters, since nobody needs its output."""


@torch.no_grad()
def refittable(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    inputs: Mapping[str, Any],
    run: Run | None = None,
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
    with replaced(forwards):
        run_batch(model, run, take_rows(inputs, [0, 0]))
    return {name: half for name, half in multiples.items() if uses[name] == 1}


@torch.no_grad()
def positions_of_row(model: nn.Module, inputs: Mapping[str, Any], run: Run | None = None) -> int:
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
            run_batch(model, run, take_rows(inputs, [0, 0]))
    finally:
        for hook in hooks:
            hook.remove()
    return most


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
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


def run_batch(model: nn.Module, run: Run | None, inputs: dict[str, Any]) -> None:
    """Pass a batch through the model, by `run` or by a plain call."""
    torch.clear_autocast_cache()  # inside an autocast of the caller it would still hold the weights before a change
    if run is None:
        model(**inputs)
    else:
        run(inputs)


def all_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a batch for one forward pass, since a loss may take values out."""
    return take_rows(inputs, [*range(find_batch_size(inputs))])


def take_rows(inputs: Mapping[str, Any], chosen: list[int]) -> dict[str, Any]:
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
