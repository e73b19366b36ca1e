"""A whole layer of the BERT family or MPNet in 8 bits, with one rounding for query, key and value.

Numbers stay in 8 bits from one product to the next where nothing but rounding lies between them. Rows go through the
layer in pieces that fit into the cache, and threads share the pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.structured.layer_shapes import MPNetFewerHeads
from .linears import CENTRED, Int8Plan, Int8Product, Step, Unsaved
from .threads import PIECE, pieces_of, share

_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "context": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "first_norm": "attention.output.LayerNorm",
    "second_norm": "output.LayerNorm",
    "activation": "intermediate.intermediate_act_fn",
    "attention": "attention.self",
}
_MPNET = {
    **_BERT,
    **{"query": "attention.attn.q", "key": "attention.attn.k", "value": "attention.attn.v"},
    **{"context": "attention.attn.o", "first_norm": "attention.LayerNorm", "attention": "attention.attn"},
}
# By the full name of the layer's class: only models in use are imported.
_FAMILIES = {
    f"transformers.models.{family}.modeling_{family}.{name}Layer": _MPNET if name == "MPNet" else _BERT
    for family, name in {
        "bert": "Bert",
        "roberta": "Roberta",
        "xlm_roberta": "XLMRoberta",
        "camembert": "Camembert",
        "electra": "Electra",
        "mpnet": "MPNet",
    }.items()
}
LINEARS = ("query", "key", "value", "context", "up", "down")


def names_of(layer: nn.Module) -> dict[str, str] | None:
    """Return the names of a layer's modules by their task; None if it is of another family, or a decoder's."""
    names = _FAMILIES.get(f"{type(layer).__module__}.{type(layer).__qualname__}")
    if names is _BERT and layer.is_decoder:
        return None
    return names


class FusedLayer(Unsaved):
    """A layer in 8 bits; its class is also a subclass of the layer's class, so that hidden states are recorded.

    Attention multiplies in bf16 from the length `bf16` on (0: never), otherwise in float32 by torch's own attention.
    """

    def __init__(self, layer: nn.Module, plans: Mapping[str, Int8Plan], bf16: int) -> None:
        nn.Module.__init__(self)  # not that of the layer's class, which would make its modules
        names = names_of(layer)
        assert names is not None
        parts: dict[str, Any] = {task: layer.get_submodule(name) for task, name in names.items()}
        self.returns_tuple = names is _MPNET
        self.first_norm, self.second_norm = parts["first_norm"], parts["second_norm"]
        self.bf16 = bf16
        attention = parts["attention"]
        self.heads, self.head_size = attention.num_attention_heads, attention.attention_head_size
        self._bias_columns = attention.bias_columns if isinstance(attention, MPNetFewerHeads) else None
        three = [plans[task] for task in ("query", "key", "value")]
        # The three leave one product as whole numbers: one unit each, so that they meet in products themselves.
        units = [self._unit(plan) for plan in three]
        biases = [torch.zeros(len(plan.scales)) if plan.bias is None else plan.bias for plan in three]
        every = torch.cat([torch.full((len(plan.scales),), unit) for plan, unit in zip(three, units, strict=True)])
        scales, bias = torch.cat([plan.scales for plan in three]) / every, torch.cat(biases) / every
        values = torch.cat([plan.values for plan in three])
        self._three = Int8Product(three[0].choice, values, scales, bias, CENTRED)
        self._alpha = units[0] * units[1] / self.head_size**0.5
        context, up, down = (plans[task] for task in ("context", "up", "down"))
        self._input, self._up_input = three[0].input, up.input
        self._context_input = Step(context.input.scale / units[2], context.input.zero)
        # The context comes in units of the value's scale.
        scales = context.scales * units[2]
        self._context = Int8Product(context.choice, context.values, scales, context.bias, context.output)
        product = Int8Product(up.choice, up.values, up.scales, up.bias, up.output)
        self._up = product.then(parts["activation"], down.input)  # numbers stay in 8 bits up to the next product
        self._down = Int8Product(down.choice, down.values, down.scales, down.bias, down.output)

    @staticmethod
    def _unit(plan: Int8Plan) -> float:
        if not isinstance(plan.output, Step) or plan.output.zero != CENTRED.zero:
            raise ValueError("query, key and value need one centred step each: export the model again")
        return plan.output.scale

    @torch.compiler.disable  # the products are compiled or packed already
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Compute the layer. hidden_states: float32 (rows, tokens, width); returns the same shape.

        Raises:
            ValueError: the attention probabilities are asked for, or the input is not float32.
        """
        if options.get("output_attentions"):
            raise ValueError("the CPU model keeps no attention probabilities: leave output_attentions out")
        if hidden_states.dtype != torch.float32:
            raise ValueError(f"the CPU model got {hidden_states.dtype}: call it outside of autocast")
        if position_bias is not None and self._bias_columns is not None:
            position_bias = position_bias[:, self._bias_columns]
        with torch.no_grad():
            output = self._layer(hidden_states.detach(), *_masks(attention_mask, position_bias))
        return (output,) if self.returns_tuple else output

    def _layer(self, states: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        rows, tokens, width = states.shape
        output = torch.empty_like(states, memory_format=torch.contiguous_format)
        if not states.numel():
            return output
        if rows >= torch.get_num_threads() or rows * tokens < 2 * PIECE:

            def work(piece: slice) -> None:
                part = states[piece]
                query, key, value = self._project(part, self._dtype(tokens))
                masks = [None if each is None else each[piece] if len(each) > 1 else each for each in (mask, bias)]
                output[piece] = self._finish(part, query, key, value, *masks)

            share(work, pieces_of(rows, tokens))
            return output
        three = states.new_empty(3, rows, self.heads, tokens, self.head_size, dtype=self._dtype(tokens))

        def project(piece: slice) -> None:
            three[:, :, :, piece] = self._project(states[:, piece], three.dtype)

        def finish(piece: slice) -> None:
            masks = [None if e is None else e[:, :, piece] if e.shape[2] > 1 else e for e in (mask, bias)]
            query, key, value = three
            output[:, piece] = self._finish(states[:, piece], query[:, :, piece], key, value, *masks)

        pieces = pieces_of(tokens, rows)
        share(project, pieces)
        share(finish, pieces)
        return output

    def _dtype(self, length: int) -> torch.dtype:
        return torch.bfloat16 if 0 < self.bf16 <= length else torch.float32

    def _project(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Return query, key and value as whole numbers, (3, rows, heads, tokens, size)."""
        rows, tokens, width = states.shape
        numbers = self._three(self._input.quantize(states.reshape(-1, width)))
        numbers = numbers.view(rows, tokens, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        return torch.empty(numbers.shape, dtype=dtype).copy_(numbers)

    def _finish(
        self, states: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Attend, and compute the rest of the layer for the tokens of `states`."""
        rows, tokens, width = states.shape
        context = self._attend(query, key, value, mask, bias).transpose(1, 2)
        context = torch.empty(context.shape, dtype=torch.float32).copy_(context).view(rows * tokens, -1)
        attended = self._context.plus(self._context_input.quantize(context), states.reshape(-1, width))
        attended = self.first_norm(attended)
        output = self._down.plus(self._up(self._up_input.quantize(attended)), attended)
        return self.second_norm(output).view(rows, tokens, width)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the context (rows, heads, tokens, size) in units of the value's scale."""
        if query.dtype == torch.float32:
            both = mask if bias is None else bias if mask is None else mask + bias
            return nn.functional.scaled_dot_product_attention(query, key, value, both, scale=self._alpha)
        shape = (*query.shape[:3], key.shape[2])
        query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        scores = query.new_empty(len(query), *shape[2:])
        scores = torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=self._alpha, out=scores)
        for each in (mask, bias):
            if each is not None:
                scores.view(shape).add_(each)
        shares = scores.softmax(-1, dtype=torch.float32).bfloat16()
        return torch.bmm(shares, value).view(*shape[:3], -1)


def fuse(layer: nn.Module, plans: Mapping[str, Int8Plan], bf16: int) -> FusedLayer:
    """Return the layer in 8 bits. plans: those of its six linear layers, by task."""
    kind = type(f"Fused{type(layer).__name__}", (FusedLayer, type(layer)), {})
    return kind(layer, plans, bf16)


def _masks(mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return masks as numbers to add; None for one that masks nothing."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -1e30) if not mask.all() else None
    elif mask is not None and not mask.any():
        mask = None
    return mask, bias
