"""The shape of a smaller model: which layers stay, one width for all of them, and one number of heads."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .families import Family

STEP = 8  # widths are multiples of it, since kernels work on whole registers


@dataclass(frozen=True)
class Shape:
    """A shape that a configuration can say.

    layers: the layers that stay, by their number in the dense model. width: neurons of every feed-forward part.
    heads: attention heads of every layer.
    """

    layers: tuple[int, ...]
    width: int
    heads: int

    def within(self, before: "Shape") -> "Shape":
        """Return this shape with its layers numbered as in the model from which `before` was made."""
        return replace(self, layers=tuple(before.layers[layer] for layer in self.layers))

    def inside(self, before: "Shape") -> "Shape":
        """Return this shape with its layers numbered as in a model of the shape `before`: the inverse of `within`.

        Raises:
            ValueError: `before` lacks one of the layers.
        """
        if missing := sorted(set(self.layers) - set(before.layers)):
            raise ValueError(
                f"layer {missing[0]} is gone from a model of {before}, so it cannot become {self}: start from the "
                "dense model"
            )
        return replace(self, layers=tuple(before.layers.index(layer) for layer in self.layers))

    def __str__(self) -> str:
        count = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        return f"{count} ({', '.join(map(str, self.layers))}), width {self.width}, {self.heads} heads"


@dataclass(frozen=True)
class Encoder:
    """The sizes of a dense model's layers, and what they cost in parameters.

    depth, width, heads, head_size: of the dense model. fixed: for each layer that has weights of its own, its
    parameters without those of neurons and of heads that may go. neuron, head: parameters of one neuron and of one
    such head. shared: whether the layers are used at several depths.
    """

    depth: int
    width: int
    heads: int
    head_size: int
    fixed: tuple[int, ...]
    neuron: int
    head: int
    shared: bool

    @classmethod
    def of(cls, model: PreTrainedModel, family: Family) -> "Encoder":
        """Measure a model."""
        layers = family.layers(model)
        attention, ffn = family.consumers(layers[0])
        heads, width = model.config.num_attention_heads, ffn.in_features
        size = attention.in_features // heads
        neuron = ffn.out_features + sum(_row(layers[0], name) for name in family.neurons) * family.ffn.parts
        head = size * (attention.out_features + sum(_row(layers[0], name) for name in family.heads))
        head = head if family.queries else 0
        totals = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
        return cls(
            depth=getattr(model.config, family.depth),
            width=width,
            heads=heads,
            head_size=size,
            fixed=tuple(total - neuron * width - head * heads for total in totals),
            neuron=neuron,
            head=head,
            shared=family.shared,
        )

    def full(self) -> Shape:
        """Return the shape of the dense model."""
        return Shape(tuple(range(self.depth)), self.width, self.heads)

    def parameters(self, shape: Shape) -> int:
        """Return the parameters of the layers of a model of this shape."""
        fixed = self._fixed(shape.layers)
        return sum(fixed) + len(fixed) * (shape.width * self.neuron + shape.heads * self.head)

    def width_of_size(self, parameters: int, layers: tuple[int, ...], heads: int) -> int:
        """Return the largest allowed width at which layers have no more parameters; below 1 if there is none."""
        fixed = self._fixed(layers)
        return self.rounded((parameters - sum(fixed) - len(fixed) * heads * self.head) // (len(fixed) * self.neuron))

    def rounded(self, width: float) -> int:
        """Round a width down to an allowed one."""
        return self.width if width >= self.width else int(width // STEP) * STEP

    def _fixed(self, layers: tuple[int, ...]) -> list[int]:
        return list(self.fixed) if self.shared else [self.fixed[layer] for layer in layers]


def _row(layer: nn.Module, name: str) -> int:
    linear: Any = layer.get_submodule(name)
    return linear.in_features + (linear.bias is not None)
