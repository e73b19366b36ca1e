"""The methods of `structured.py`: from a task with its dense model to a smaller model and its shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_maskselect import shrink_model
from hf_maskselect.surgery.structured.batches import Batch, batches_of, real_positions, rows_of, timed_batch
from hf_maskselect.surgery.structured.budget import Budget
from hf_maskselect.surgery.structured.cut import Cutter
from hf_maskselect.surgery.structured.families import family_of
from hf_maskselect.surgery.structured.latency import Latency
from hf_maskselect.surgery.structured.moments import solve
from hf_maskselect.surgery.structured.shapes import STEP, Shape
from hf_maskselect.surgery.structured.target import narrowed
from hf_maskselect.utils.judge import Judge

TIMED = (8, 128)  # batch size and length that are timed
BATCH = 32  # rows of one gradient
FITTED = 32768  # positions that the scales are fitted on
WIDE = 0.75  # share of the width that layer drop leaves

Made = tuple[PreTrainedModel, Any]  # a smaller model and its shape


class Start:
    """A dense model to make smaller, and the rows for it.

    Args:
        dense: the model, in eval mode.
        rows: tokenized rows of train, with their labels.
        held_out: further rows of train, to choose on.
        collator: makes batches of rows, with their labels.
        speedup: how many times as fast the smaller model shall be.
        keep_shape: argument of `shrink_model`.
        seed: argument of `shrink_model`.
        times: what was timed before, for dense models of one shape.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        rows: Dataset,
        held_out: Dataset,
        collator: Callable[[list], Any],
        speedup: float,
        keep_shape: str,
        seed: int,
        times: dict[str, float],
    ) -> None:
        self.dense, self.rows, self.collator = dense, rows, collator
        self.speedup, self.keep_shape, self.seed, self.times = speedup, keep_shape, seed, times
        self.family = family_of(dense)
        self.encoder = Cutter(dense, self.family).encoder
        self.divergence = Judge(dense, batches_of(rows_of(held_out, dense), dense))

    @cached_property
    def timed(self) -> Batch:
        """The batch that is timed."""
        return timed_batch(rows_of(self.rows, self.dense)[0], self.dense, TIMED)

    @cached_property
    def latency(self) -> Latency:
        """The times of this machine."""
        return Latency(Cutter(self.dense, self.family), self.timed, torch.float32, self.dense.device, self.times)

    def width(self, layers: tuple[int, ...]) -> int:
        """Return the width at which a model of these layers has the speed-up, by the table; 0 if there is none."""
        budget = Budget(self.encoder, self.latency.predicted, self.latency.dense / self.speedup)
        return budget.width_of(layers, self.encoder.heads)

    def shape(self, layers: tuple[int, ...]) -> Shape | None:
        """Return the shape of these layers whose measured time meets the speed-up; None if there is none."""
        width = self.width(layers)
        shape = self.encoder.uniform(layers, max(width, STEP), self.encoder.heads)
        return None if width < STEP else narrowed(self.latency, shape, self.speedup)

    @cached_property
    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights times gradients, summed over each neuron, for each layer (batches, neurons).

        The first are of the weights that produce a neuron. The second are of those that read it, which is the gradient
        of a mask on the neuron.
        """
        layers = self.family.layers(self.dense)
        producers: Any = [layer.get_submodule(self.family.ffn.producer) for layer in layers]
        consumers: Any = [self.family.consumers(layer)[1] for layer in layers]
        made, read = [[] for _ in layers], [[] for _ in layers]
        for start in range(0, len(self.rows), BATCH):
            rows = [self.rows[row] for row in range(start, min(start + BATCH, len(self.rows)))]
            self.dense.zero_grad()
            self.dense(**self.collator(rows)).loss.backward()
            for index, (producer, consumer) in enumerate(zip(producers, consumers, strict=True)):
                sums = (producer.weight * producer.weight.grad).sum(1) + producer.bias * producer.bias.grad
                made[index].append(sums.detach())
                read[index].append((consumer.weight * consumer.weight.grad).sum(0).detach())
        self.dense.zero_grad()
        return list(map(torch.stack, made)), list(map(torch.stack, read))

    @cached_property
    def preparation(self) -> float:
        """Processor seconds of the table of times and of the gradients, which all methods but ours share."""
        begin = time.process_time()
        assert self.latency and self.gradients
        return time.process_time() - begin

    def cut(self, shape: Shape, orders: Sequence[Tensor]) -> PreTrainedModel:
        """Return the model of a shape without a fit; `orders` has the neurons of each layer in the order they go."""
        return Cutter(self.dense, self.family, [(torch.empty(0), order) for order in orders]).cut(shape)

    def best(self, models: Sequence[Made]) -> Made:
        """Return the model that diverges least from the dense one on held-out rows."""
        return min(models, key=lambda made: self.divergence(made[0]))


def ours(start: Start) -> Made:
    """Return the model of `shrink_model`."""
    free = {} if start.keep_shape == "uniform" else {"keep_shape": start.keep_shape}
    options = {"speedup": start.speedup, "latency_shape": TIMED, "seed": start.seed, **free}
    small, report = shrink_model(start.dense, start.rows.remove_columns("label"), **options)
    print(report, flush=True)
    return small, report.shape


def layers(start: Start) -> Made | None:
    """Return the best model without whole layers."""
    encoder = start.encoder
    depth = encoder.depth
    for count in range(depth - 1, 0, -1):
        if start.width(tuple(range(count))) >= WIDE * encoder.width:
            break
    else:
        return None
    width = start.shape(tuple(range(count))).width
    first = tuple(range(count))
    even, odd = (tuple((index * depth + late) // count - (late > 0) for index in range(count)) for late in (0, depth))
    shapes = [encoder.uniform(kept, width, encoder.heads) for kept in dict.fromkeys((first, even, odd))]
    return start.best([(start.cut(shape, magnitudes(start)), shape) for shape in shapes])


def magnitude(start: Start) -> Made | None:
    """Return the model without the neurons whose weights times gradients are least."""
    shape = start.shape(start.encoder.full().layers)
    return None if shape is None else (start.cut(shape, magnitudes(start)), shape)


def kwon(start: Start) -> Made | None:
    """Return the model without the neurons whose masks have the least Fisher information, with scales."""
    shape = start.shape(start.encoder.full().layers)
    if shape is None:
        return None
    masks, gone = start.gradients[1], start.encoder.width - shape.width
    alone = [gradients.square().sum(0).argsort() for gradients in masks]
    exchanged = [exchange(gradients, order, gone) for gradients, order in zip(masks, alone, strict=True)]
    smalls = [start.cut(shape, orders) for orders in (alone, exchanged)]
    for small in smalls:
        rescale(small, start)
    return start.best([(small, shape) for small in smalls])


METHODS = {method.__name__: method for method in (ours, layers, magnitude, kwon)}


def magnitudes(start: Start) -> list[Tensor]:
    """Return the neurons of each layer by their weights times gradients, the least first."""
    return [(made.abs() + read.abs()).sum(0).argsort() for made, read in zip(*start.gradients, strict=True)]


def exchange(gradients: Tensor, order: Tensor, gone: int) -> Tensor:
    """Exchange each neuron that goes for the one that then costs least, by the Fisher information between neurons.

    The cost of a set of neurons is the squared sum of their gradients, summed over batches.
    """
    removed, alone = order[:gone].clone(), gradients.square().sum(0)
    total = gradients[:, removed].sum(1)
    for place in range(gone):
        total -= gradients[:, removed[place]]
        costs = alone + 2 * total @ gradients
        costs[removed[:place]] = costs[removed[place + 1 :]] = float("inf")
        removed[place] = costs.argmin()
        total += gradients[:, removed[place]]
    return torch.cat([removed, order[~torch.isin(order, removed)]])


@torch.no_grad()
def rescale(small: PreTrainedModel, start: Start) -> None:
    """Scale heads and neurons, from the first layer to the last, so that each sublayer's sum is near the dense one."""
    family = start.family
    rows, dense_layers = rows_of(start.rows, small), family.layers(start.dense)
    head = start.encoder.head_size
    few = sum(positions <= FITTED for positions in accumulate(len(row["input_ids"]) for row in rows))
    batches = batches_of(rows[:few], small)
    sums = [layer.get_submodule(name) for layer in dense_layers for name in family.sums]
    targets = [inputs_of(start.dense, sums, batch) for batch in batches]
    sublayers = [
        (layer.get_submodule(name), consumer, size)
        for layer in family.layers(small)
        for name, consumer, size in zip(family.sums, family.consumers(layer), (head, 1), strict=True)
    ]
    for number, (sum_, consumer, size) in enumerate(sublayers):
        gram, cross = 0.0, 0.0
        for batch, target in zip(batches, targets, strict=True):
            total, inputs = inputs_of(small, [sum_, consumer], batch)
            gram = gram + inputs.T @ inputs
            cross = cross + (inputs * ((target[number] - total) @ consumer.weight)).sum(0)
        scaled = torch.eye(consumer.in_features // size).repeat_interleave(size, 0)
        gram = scaled.T @ (gram * (consumer.weight.T @ consumer.weight)) @ scaled
        consumer.weight.mul_(1 + scaled @ solve(gram, (cross @ scaled)[None])[0])


def inputs_of(model: PreTrainedModel, modules: Sequence[nn.Module], batch: Batch) -> list[Tensor]:
    """Return the inputs of some modules at the real positions of a batch."""
    seen: dict[nn.Module, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]})) for module in modules
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [real_positions(seen[module], batch) for module in modules]
