"""What the uncut model computes, at a sample of positions: the targets of every refit after a cut."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from ..masking.targets import is_layer, transposed_weights
from ..utils.wrappers import plain_model
from .passes import Forward, LastLayer, Run, all_rows, refittable, replaced, run_batch

LEAST_SAMPLED = 8192  # positions of a narrow matrix
SAMPLED_PER_INPUT = 6  # positions per input of a wide one, so that each kept weight of an output has several


def most_sampled(inputs: int) -> int:
    """Return at how many positions a matrix with so many inputs is refitted, if there are as many."""
    return max(LEAST_SAMPLED, SAMPLED_PER_INPUT * inputs)


class Positions:
    """The positions of a batch at which matrices are refitted: a fixed random sample of the real ones.

    Args:
        real: the attention mask. Positions where it is 0 are left out of values that have as many positions.
    """

    def __init__(self, real: Tensor | None) -> None:
        self._real, self._orders = real, dict[int, Tensor]()

    def apply(self, forward: Forward, values: Tensor) -> Tensor:
        """Return `forward(values)`, which takes each position by itself, with zeros where there is padding."""
        if self._real is None or self._real.numel() != values[..., 0].numel() or self._real.all():
            return forward(values)
        real = self._real.reshape(values.shape[:-1]).bool()
        some = forward(values[real])
        output = some.new_zeros(*values.shape[:-1], some.shape[-1])
        output[real] = some
        return output

    def of(self, values: Tensor, inputs: int) -> Tensor:
        """Return `(positions, features)` of `(rows, positions, features)`, for a matrix with so many inputs."""
        values = values.reshape(-1, values.shape[-1])
        if len(values) not in self._orders:
            self._orders[len(values)] = self._order(len(values), values.device)
        order = self._orders[len(values)][: most_sampled(inputs)]
        return values[order.sort().values]

    def _order(self, count: int, device: torch.device) -> Tensor:
        """Return the real ones of `count` positions in a random order, which is always the same."""
        if self._real is not None and self._real.numel() == count:
            real = self._real.flatten().nonzero()[:, 0].cpu()
        else:
            real = torch.arange(count)
        return real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))].to(device)


@dataclass
class DenseOutputs:
    """The outputs of the uncut matrices for one batch of rows.

    They need memory: for every matrix `most_sampled` positions times its outputs, in the dtype that the model computes
    in. In fp32 these are at most 0.7 GB for MiniLM and 3.0 GB for BERT-base.

    Attributes:
        inputs: the batch.
        run: passes it through the model; None for `model(**inputs)`.
        positions: where outputs are kept.
        outputs: name of a weight -> `(positions, outputs)`, in the order of a forward pass.
        rows: name -> length of the first dimension of its input.
    """

    inputs: dict[str, Any]
    run: Run | None
    positions: Positions
    outputs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def dense_outputs(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    run: Run | None = None,
) -> DenseOutputs:
    """Run the uncut model once and keep what a refit of any cut needs of it; the arguments are those of `refit`.

    It makes no difference whether the model has been cut already: inside, its weights are those of `before`.

    Raises:
        ValueError: as `refit`.
    """
    model = plain_model(model)
    if model.training:
        raise ValueError(
            "refit needs a model in eval mode, because dropout would spoil the targets: call model.eval()"
        )
    _check_weights(model, weights, before)
    multiples, rows = refittable(model, weights, inputs, run), find_batch_size(inputs)
    transposed = transposed_weights(model)
    dense = DenseOutputs(dict(inputs), run, Positions(inputs.get("attention_mask")))
    dense.rows = {name: rows * multiple for name, multiple in multiples.items()}
    if not multiples:
        return dense

    def forward_of(name: str, original: Forward) -> Forward:
        width = before[name].shape[0 if name in transposed else 1]

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            (values,) = (*args, *kwargs.values())
            if len(values) != dense.rows[name]:
                return original(values)
            output = dense.positions.apply(original, values)
            dense.outputs[name] = dense.positions.of(output, width)
            if name == last:
                raise LastLayer
            return output

        return forward

    last = list(multiples)[-1]
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in multiples}
    forwards = {module: forward_of(name, module.forward) for name, module in modules.items()}
    cut = {name: weight.data for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data = before[name].to(weight.data)
        with replaced(forwards), contextlib.suppress(LastLayer):
            run_batch(model, run, all_rows(inputs))
    finally:
        for name, weight in weights.items():
            weight.data = cut[name]
    return dense


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
