"""A copy of a model without some layers, neurons and heads, whose configuration says its shape."""

import copy
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import Family, family_of
from .layer_shapes import LayerShapes, bias_columns, read_columns
from .moments import Gram, solve
from .shapes import Encoder, Shape, head_size


class Cutter:
    """Makes smaller copies of a dense model.

    orders: for each layer the heads and the neurons in the order of their removal; empty orders keep the first ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        orders: Sequence[tuple[Tensor, Tensor]] = (),
        grams: Sequence[tuple[Gram | None, Gram]] = (),
    ) -> None:
        self.model, self.family, self.encoder = model, family, Encoder.of(model, family)
        self._orders, self._grams = orders, grams

    @torch.no_grad()
    def cut(self, shape: Shape) -> PreTrainedModel:
        """Return a smaller copy. What remains of the consumers takes over for what is removed, by least squares.

        Raises:
            ValueError: the layers share their weights, and heads or layers shall go.
        """
        small, family = copy.deepcopy(self.model), self.family
        if family.shared and (shape.layers, shape.heads) != (self.encoder.full().layers, self.encoder.head_counts):
            raise ValueError(
                f"the layers of a {small.config.model_type!r} model share their weights, so that neither they nor "
                "their heads can go: cut its width alone"
            )
        layers = family.layers(small)
        for index, width, heads in zip(shape.layers, shape.widths, shape.heads, strict=True):
            if index < len(layers):  # shared layers are fewer
                self._cut_layer(layers[index], index, width, heads)
        config: Any = small.config
        if not family.shared:
            stack: Any = small.base_model.get_submodule(family.stack)
            kept = nn.ModuleList([stack[index] for index in shape.layers]).train(stack.training)
            small.base_model.set_submodule(family.stack, kept)
            setattr(config, family.depth, len(shape.layers))
            for field in family.by_layer:
                setattr(config, field, [getattr(config, field)[index] for index in shape.layers])
        self._say(shape, small)
        return small

    def _say(self, shape: Shape, small: PreTrainedModel) -> None:
        """Say the shape in the fields of the configuration if they can, otherwise layer by layer."""
        family, config = self.family, small.config
        alike = len(set(shape.widths)) == len(set(shape.heads)) == 1
        if alike and (family.plain_heads or shape.most_heads == config.num_attention_heads):
            LayerShapes.forget(config)
            setattr(config, family.width, shape.width)
            if shape.most_heads < config.num_attention_heads:
                config.head_dim = self.encoder.head_size
                config.num_attention_heads = shape.most_heads
            return
        attentions = [layer.get_submodule(family.biased) for layer in family.layers(small)] if family.biased else []
        columns = [tuple(bias_columns(attention, config.num_attention_heads)) for attention in attentions]
        LayerShapes(shape.heads, shape.widths, tuple(columns)).say(config)

    def _cut_layer(self, layer: nn.Module, index: int, width: int, heads: int) -> None:
        attention, ffn = self.family.consumers(layer)
        head_gram, gram = self._grams[index] if self._grams else (None, None)
        if width < ffn.in_features:
            keep_neurons(layer, self.family, self._kept(index, 1, width, ffn.weight.device), gram)
        if heads < self.encoder.head_counts[index]:
            kept = self._kept(index, 0, heads, attention.weight.device)
            keep_heads(layer, self.family, kept, self.encoder.head_size, head_gram)

    def _kept(self, index: int, kind: int, count: int, device: torch.device) -> Tensor:
        if not self._orders:
            return torch.arange(count, device=device)
        return self._orders[index][kind][-count:].sort().values


@torch.no_grad()
def keep_neurons(layer: nn.Module, family: Family, kept: Tensor, gram: Gram | None = None) -> None:
    """Keep some neurons of a layer; with a Gram matrix of all of them they take over for the others."""
    for name in family.neurons:
        _keep_rows(layer.get_submodule(name), kept, family.ffn.parts)
    _keep_columns(family.consumers(layer)[1], kept, gram)


@torch.no_grad()
def keep_heads(layer: nn.Module, family: Family, heads: Tensor, size: int, gram: Gram | None = None) -> None:
    """Keep some heads of a layer, of `size` channels each, and correct the numbers that the layer holds."""
    kept = (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
    attention = family.consumers(layer)[0]
    before = attention.in_features // size
    for name in family.heads(layer):
        _keep_rows(layer.get_submodule(name), kept, family.attention.parts)
    _keep_columns(attention, kept, gram)
    for names, count in ((family.head_counts, len(heads)), (family.channel_counts, len(kept))):
        for name in names:
            *path, attribute = name.split(".")
            setattr(reduce(getattr, path, layer), attribute, count)
    if family.biased:
        module = layer.get_submodule(family.biased)
        columns = bias_columns(module, before)
        read_columns(module, [columns[head] for head in heads.tolist()])


def give_shapes(model: PreTrainedModel) -> None:
    """Give the layers of an ordinary model the shapes that its configuration says layer by layer, if it says any.

    The weights that stay are the first ones of each layer: they are there to be loaded over.

    Raises:
        ValueError: the shapes are damaged, or do not fit the model or its family.
    """
    shapes = LayerShapes.of(model.config)
    if shapes is None:
        return
    family, size = family_of(model), head_size(model.config)
    layers = [] if family.shared else family.layers(model)
    for index, (layer, width, heads) in enumerate(zip(layers, shapes.widths, shapes.heads, strict=True)):
        most = family.consumers(layer)[1].in_features
        if width > most:
            raise ValueError(
                f"layer {index} has {width} neurons, but config.json says at most {most}: restore the file"
            )
        keep_neurons(layer, family, torch.arange(width, device="cpu"))  # the model may be on the meta device
        keep_heads(layer, family, torch.arange(heads, device="cpu"), size)
    read_biases(model, shapes)


def read_biases(model: PreTrainedModel, shapes: LayerShapes) -> None:
    """Make each layer read the columns of the shared table of position biases that some shapes say."""
    family = family_of(model)
    if family.biased:
        for layer, columns in zip(family.layers(model), shapes.biases, strict=True):
            read_columns(layer.get_submodule(family.biased), list(columns))
        shapes.say(model.config)


def _keep_rows(linear: Any, kept: Tensor, parts: int = 1) -> None:
    """Keep some output rows of a linear layer, the same ones in each of its equal parts."""
    size = linear.out_features // parts
    rows = torch.cat([kept + part * size for part in range(parts)])
    linear.weight = nn.Parameter(linear.weight[rows].contiguous(), linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows].contiguous(), linear.bias.requires_grad)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, kept: Tensor, gram: Gram | None) -> None:
    """Keep some input columns, which with a Gram matrix take over for the others as well as they can."""
    weight = linear.weight
    new = weight[:, kept]
    if gram is not None:
        lost = weight.float().clone()
        lost[:, kept] = 0
        new = new + solve(gram.matrix[kept][:, kept], lost @ gram.matrix[:, kept]).to(new.dtype)
    linear.weight = nn.Parameter(new.contiguous(), weight.requires_grad)
    linear.in_features = len(kept)
