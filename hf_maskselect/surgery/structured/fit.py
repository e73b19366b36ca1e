"""The fit of a smaller model, from its first layer to its last, by least squares.

The consumers of a layer are changed so that each sum of a sublayer's output and its residual is that of the dense
model. The residual is the small model's own, so that every sublayer also corrects what those before it have lost, and
what removed layers would have added (as in K-prune, arXiv 2308.03449, and Kwon et al., arXiv 2204.09656).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batches import Batch, real_positions
from .families import Family
from .moments import Residual


class _Reached(Exception):
    """Ends the forward pass of a layer after the sum that is looked at."""


class Calls:
    """What the layers of a dense model are called with, batch by batch, and the sums of their sublayers.

    Args:
        model: in eval mode.
        family: its family.
        batches: inputs of the model.
        keeps: hold the sums in memory for the next fit, instead of computing them again.
    """

    def __init__(self, model: PreTrainedModel, family: Family, batches: Sequence[Batch], keeps: bool = False) -> None:
        self.batches = batches
        self.starts: list[Tensor] = []
        self._others: list[list[tuple[tuple, dict]]] = []
        self._family, self._layers, self._keeps = family, family.layers(model), keeps
        self._kept: list[list[tuple[Tensor, Tensor]]] = []
        layers = self._layers

        def record(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            if layer is layers[0]:
                self.starts.append(args[0])
                self._others.append([])
            self._others[-1].append((args[1:], kwargs))

        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
        finally:
            for handle in handles:
                handle.remove()

    def sums(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield for each layer, batch by batch, its sums after attention and after the feed-forward part."""
        if len(self._kept) == len(self._layers):
            yield from self._kept
            return
        self._kept, states = [], list(self.starts)
        for index, layer in enumerate(self._layers):
            pairs = []
            for number, state in enumerate(states):
                with _sums(layer, self._family) as sums:
                    states[number] = self.run(layer, index, number, state)
                pairs.append((sums[0], sums.get(1, states[number])))
            if self._keeps:
                self._kept.append(pairs)
            yield pairs

    def run(self, layer: nn.Module, index: int, batch: int, states: Tensor) -> Tensor:
        """Run a layer as the layer `index` of the dense model, on other states; returns its output."""
        args, kwargs = self._others[batch][index]
        output = layer(states, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def fit(small: PreTrainedModel, family: Family, kept: Sequence[int], calls: Calls) -> None:
    """Fit the consumers of a smaller model in place.

    Args:
        small: in eval mode, in float32.
        family: its family; the layers must not be shared.
        kept: the number in the dense model of each layer of `small`.
        calls: of the dense model.
    """
    ours, states = dict(zip(kept, family.layers(small), strict=True)), list(calls.starts)
    for index, targets in enumerate(calls.sums()):
        if index not in ours:
            continue
        layer = ours[index]
        seen: list[tuple[Tensor, Tensor]] = []
        for which, consumer in enumerate(family.consumers(layer)):
            residual, seen = Residual(), []
            for number, batch in enumerate(calls.batches):
                inputs, sum_ = _seen(layer, family, which, calls, index, number, states[number])
                missing = targets[number][which] - sum_
                residual.add(real_positions(inputs, batch), real_positions(missing, batch))
                seen.append((inputs, sum_))
            change = residual.correct(consumer)
        # The last consumer has changed since its sums were seen. What it adds now saves a pass of the layer.
        end = layer.get_submodule(family.sums[1]) if family.sums[1] else nn.Identity()
        states = [end(sum_ + nn.functional.linear(inputs, *change)) for inputs, sum_ in seen]


def _seen(
    layer: nn.Module, family: Family, which: int, calls: Calls, index: int, batch: int, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the input of a consumer, and the sum of its output and the residual."""
    inputs: list[Tensor] = []
    handle = family.consumers(layer)[which].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        with _sums(layer, family, which) as sums, contextlib.suppress(_Reached):
            output = calls.run(layer, index, batch, states)
            sums[which] = output
    finally:
        handle.remove()
    return inputs[0], sums[which]


@contextlib.contextmanager
def _sums(layer: nn.Module, family: Family, last: int | None = None) -> Iterator[dict[int, Tensor]]:
    """Record the sums of a layer's sublayers; the layer stops at the sum `last`."""
    sums: dict[int, Tensor] = {}

    def record(which: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[which] = args[0]
            if which == last:
                raise _Reached

        return hook

    named = [(which, name) for which, name in enumerate(family.sums) if name]
    handles = [layer.get_submodule(name).register_forward_pre_hook(record(which)) for which, name in named]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
