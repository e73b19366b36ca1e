"""The shape of a smaller model: which layers stay, and how many heads and neurons each of them has."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .families import Family

STEP = 8  # widths are multiples of it, since kernels work on whole registers


@dataclass(frozen=True)
class Shape:
    """The layers that stay, by their number in the dense model, and the neurons and heads of each of them."""

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def width(self) -> int:
        """Neurons of the widest feed-forward part."""
        return max(self.widths)

    @property
    def most_heads(self) -> int:
        """Heads of the layer that has most."""
        return max(self.heads)

    def is_whole(self) -> bool:
        """Whether layers rise from 0 or above, and each has neurons and heads."""
        rising = all(a < b for a, b in zip((-1, *self.layers), self.layers, strict=False))
        counts = len(self.layers) == len(self.widths) == len(self.heads) > 0
        return rising and counts and min(*self.widths, *self.heads) > 0

    def within(self, before: "Shape") -> "Shape":
        """Return this shape with its layers numbered as in the model from which `before` was made."""
        return replace(self, layers=tuple(before.layers[layer] for layer in self.layers))

    def inside(self, before: "Shape") -> "Shape":
        """Return this shape with its layers numbered as in a model of the shape `before`: the inverse of `within`.

        Raises:
            ValueError: `before` lacks one of the layers, or has one that is smaller.
        """
        if missing := sorted(set(self.layers) - set(before.layers)):
            raise ValueError(
                f"layer {missing[0]} is gone from a model of {before}, so it cannot become {self}: start from the "
                "dense model"
            )
        places = [before.layers.index(layer) for layer in self.layers]
        for place, width, heads in zip(places, self.widths, self.heads, strict=True):
            if before.widths[place] < width or before.heads[place] < heads:
                raise ValueError(
                    f"layer {before.layers[place]} of a model of {before} is too small to become {self}: start from "
                    "the dense model"
                )
        return replace(self, layers=tuple(places))

    def __str__(self) -> str:
        count = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        widths, heads = told(self.widths), told(self.heads)
        width = f"width{'s' * (',' in widths)} {widths}"
        return f"{count} ({_listed(self.layers)}), {width}, " + (
            f"heads {heads}" if "," in heads else f"{heads} heads"
        )


def told(numbers: tuple[int, ...]) -> str:
    """Return numbers in words: one if all are alike."""
    return _listed(numbers[:1] if len(set(numbers)) == 1 else numbers)


@dataclass(frozen=True)
class Encoder:
    """The sizes of a dense model's layers, and what they cost in parameters.

    widths, head_counts: neurons and heads of each layer. head_size: channels of a head. fixed: for each layer that has
    weights of its own, its parameters without those of neurons and of heads. neuron, head: parameters of one neuron
    and of one head. shared: whether the layers are used at several depths.
    """

    widths: tuple[int, ...]
    head_counts: tuple[int, ...]
    head_size: int
    fixed: tuple[int, ...]
    neuron: int
    head: int
    shared: bool

    @classmethod
    def of(cls, model: PreTrainedModel, family: Family) -> "Encoder":
        """Measure a model."""
        layers, config = family.layers(model), model.config
        consumers = [family.consumers(layer) for layer in layers]
        size = head_size(config)
        widths = tuple(ffn.in_features for _, ffn in consumers)
        heads = tuple(attention.in_features // size for attention, _ in consumers)
        attention, ffn = consumers[0]
        neuron = ffn.out_features + sum(_row(layers[0], name) for name in family.neurons) * family.ffn.parts
        rows = sum(_row(layers[0], name) for name in family.heads(layers[0])) * family.attention.parts
        head = size * (attention.out_features + rows)
        totals = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
        sizes = zip(totals, widths, heads, strict=True)
        depth = getattr(config, family.depth)
        return cls(
            widths=widths[:1] * depth if family.shared else widths,
            head_counts=heads[:1] * depth if family.shared else heads,
            head_size=size,
            fixed=tuple(total - neuron * width - head * count for total, width, count in sizes),
            neuron=neuron,
            head=head,
            shared=family.shared,
        )

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.widths)

    @property
    def width(self) -> int:
        """Neurons of the widest layer."""
        return max(self.widths)

    @property
    def heads(self) -> int:
        """Heads of the layer that has most."""
        return max(self.head_counts)

    def full(self) -> Shape:
        """Return the shape of the dense model."""
        return Shape(tuple(range(self.depth)), self.widths, self.head_counts)

    def uniform(self, layers: tuple[int, ...], width: int, heads: int) -> Shape:
        """Return the shape with one width and one number of heads; layers that are smaller stay as they are."""
        return Shape(
            layers,
            tuple(min(width, self.widths[layer]) for layer in layers),
            tuple(min(heads, self.head_counts[layer]) for layer in layers),
        )

    def parameters(self, shape: Shape) -> int:
        """Return the parameters of the layers of a model of this shape."""
        if self.shared:
            return sum(self.fixed) + len(self.fixed) * (self.neuron * shape.widths[0] + self.head * shape.heads[0])
        fixed = sum(self.fixed[layer] for layer in shape.layers)
        return fixed + self.neuron * sum(shape.widths) + self.head * sum(shape.heads)

    def allowed_widths(self) -> list[int]:
        """Return the widths that a layer may get: multiples of 8, and the full width."""
        return [*range(STEP, self.width, STEP), self.width]


def head_size(config: Any) -> int:
    """Return the channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _row(layer: nn.Module, name: str) -> int:
    linear: Any = layer.get_submodule(name)
    return linear.in_features + (linear.bias is not None)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
