"""A copy of a model without some layers, neurons and heads, whose configuration says its shape."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import Family
from .moments import Gram, solve
from .shapes import Encoder, Shape


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
        """Return a smaller copy. What remains of the consumers takes over for what is removed, by least squares."""
        small, family, encoder = copy.deepcopy(self.model), self.family, self.encoder
        for index, layer in enumerate(family.layers(small)):
            if family.shared or index in shape.layers:
                self._cut_layer(layer, index, shape)
        config: Any = small.config
        if not family.shared:
            stack: Any = small.base_model.get_submodule(family.stack)
            small.base_model.set_submodule(family.stack, nn.ModuleList([stack[index] for index in shape.layers]))
            setattr(config, family.depth, len(shape.layers))
            for field in family.by_layer:
                setattr(config, field, [getattr(config, field)[index] for index in shape.layers])
        setattr(config, family.width, shape.width)
        if shape.heads < encoder.heads:
            config.head_dim = encoder.head_size
            config.num_attention_heads = shape.heads
        return small

    def _cut_layer(self, layer: nn.Module, index: int, shape: Shape) -> None:
        family, encoder = self.family, self.encoder
        attention, ffn = family.consumers(layer)
        head_gram, gram = self._grams[index] if self._grams else (None, None)
        if shape.width < encoder.width:
            kept = self._kept(index, 1, shape.width, attention.weight.device)
            for name in family.neurons:
                _keep_rows(layer.get_submodule(name), kept, family.ffn.parts)
            _keep_columns(ffn, kept, gram)
        if shape.heads < encoder.heads:
            heads = self._kept(index, 0, shape.heads, attention.weight.device)
            kept = (
                heads[:, None] * encoder.head_size + torch.arange(encoder.head_size, device=heads.device)
            ).flatten()
            for name in family.heads:
                _keep_rows(layer.get_submodule(name), kept)
            _keep_columns(attention, kept, head_gram)

    def _kept(self, index: int, kind: int, count: int, device: torch.device) -> Tensor:
        if not self._orders:
            return torch.arange(count, device=device)
        return self._orders[index][kind][-count:].sort().values


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
