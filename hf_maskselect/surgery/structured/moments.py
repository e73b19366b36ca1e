"""Gram matrices of the inputs of linear layers, gathered batch by batch, and what is solved from them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..least_squares import ridge
from .batches import Batch, real_positions
from .families import Family


class Gram:
    """The Gram matrix of an input: `x.T @ x` over all positions, float32 (features, features)."""

    def __init__(self) -> None:
        self.matrix: Any = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Add positions, (positions, features)."""
        self.matrix = self.matrix + values.T @ values
        self.count += len(values)


class Residual:
    """Least squares of what is missing in the output of a linear layer, over batches of positions."""

    def __init__(self) -> None:
        self._gram: Any = 0.0
        self._cross: Any = 0.0
        self._inputs: Any = 0.0
        self._missing: Any = 0.0
        self._count = 0

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Add positions: inputs (positions, in) and what their outputs lack (positions, out)."""
        self._gram = self._gram + inputs.T @ inputs
        self._cross = self._cross + missing.T @ inputs
        self._inputs, self._missing = self._inputs + inputs.sum(0), self._missing + missing.sum(0)
        self._count += len(inputs)

    def correct(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Add the missing part to a layer's weight and bias, with a ridge that holds the weight near its value.

        Returns:
            the change of the weight, and that of the bias if there is one.
        """
        gram, cross = self._gram, self._cross
        center, shift = self._inputs / self._count, self._missing / self._count
        if linear.bias is not None:
            gram = gram - self._count * torch.outer(center, center)
            cross = cross - self._count * torch.outer(shift, center)
        delta = solve(gram, cross).to(linear.weight.dtype)
        linear.weight.add_(delta)
        if linear.bias is None:
            return delta, None
        shift = (shift - delta @ center).to(linear.bias.dtype)
        linear.bias.add_(shift)
        return delta, shift


def solve(gram: Tensor, cross: Tensor) -> Tensor:
    """Return the `(out, in)` matrix D for which `x @ D.T` is nearest, with the ridge of `least_squares.ridge`."""
    damped = gram.double()
    damped.diagonal().add_(ridge(damped).clamp(min=1e-12))
    return torch.cholesky_solve(cross.double().T, torch.linalg.cholesky(damped)).T.to(cross.dtype)


@torch.no_grad()
def consumer_grams(
    model: PreTrainedModel, family: Family, batches: Sequence[Batch], heads: bool
) -> list[tuple[Gram | None, Gram]]:
    """Return the Gram matrices of what the consumers of each layer read: of heads, if they may go, and of neurons.

    It is one pass of the dense model; the memory does not depend on the number of batches.
    """
    grams = [(Gram() if heads else None, Gram()) for _ in family.layers(model)]
    current: list[Batch] = []

    def into(gram: Gram) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: gram.add(real_positions(args[0], current[-1]))

    handles = [
        consumer.register_forward_pre_hook(into(gram))
        for layer, pair in zip(family.layers(model), grams, strict=True)
        for consumer, gram in zip(family.consumers(layer), pair, strict=True)
        if gram is not None
    ]
    try:
        for batch in batches:
            current[:] = [batch]
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return grams
