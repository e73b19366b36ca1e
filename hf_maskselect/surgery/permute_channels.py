"""Permuting hidden channels of transformer layers so that N:M keeps more magnitude, with the same function.

A channel can move where only one layer makes it and only one reads it: the inner channels of a feed-forward block, and
the value channels inside each attention head. The rows of the producer (and its bias) and the columns of the consumer
move together, and every output is what it was, to rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..masking.patterns import NM, parse_pattern
from ..utils.tables import text_table
from .column_order import kept_magnitude, search_permutation


@dataclass(frozen=True)
class Coupling:
    """Two linear layers of one block and the channels between them.

    producer, consumer: module names inside the block. parts: equal parts of the producer's rows, of which `moved` make
    the channels; a gated block has two that are multiplied, a fused attention three, the last for the values. heads:
    whether channels must stay inside their attention head.
    """

    producer: str
    consumer: str
    parts: int = 1
    moved: tuple[int, ...] = (0,)
    heads: bool = False


_BERT = (
    Coupling("attention.self.value", "attention.output.dense", heads=True),
    Coupling("intermediate.dense", "output.dense"),
)
COUPLINGS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "albert": (Coupling("attention.value", "attention.dense", heads=True), Coupling("ffn", "ffn_output")),
    "deberta-v2": (Coupling("attention.self.value_proj", "attention.output.dense", heads=True), _BERT[1]),
    "distilbert": (
        Coupling("attention.v_lin", "attention.out_lin", heads=True),
        Coupling("ffn.lin1", "ffn.lin2"),
    ),
    "modernbert": (
        Coupling("attn.Wqkv", "attn.Wo", parts=3, moved=(2,), heads=True),
        Coupling("mlp.Wi", "mlp.Wo", parts=2, moved=(0, 1)),
    ),
}


@dataclass(frozen=True)
class PermutationReport:
    """Kept magnitude of each consumer under N:M before and after, as shares of its whole magnitude."""

    rows: tuple[tuple[str, float, float], ...]

    @property
    def mean_gain(self) -> float:
        """Mean over matrices of what is kept more, relative to what was kept; 0.01 is one percent."""
        return sum(after / before - 1 for _, before, after in self.rows) / max(len(self.rows), 1)

    def __str__(self) -> str:
        rows = [
            [name, f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}"] for name, before, after in self.rows
        ]
        return text_table(["matrix", "kept before", "kept after", "gain"], rows)


def permute_channels(
    model: PreTrainedModel,
    pattern: str = "2:4",
    names: Collection[str] | None = None,
    rounds: int = 200,
    seed: int = 0,
) -> PermutationReport:
    """Reorder hidden channels in place so that `pattern` will keep at least as much magnitude in every matrix.

    Args:
        model: a BERT-family model of transformers.
        pattern: `"N:M"`.
        names: parameters (`"...weight"`) that will be pruned; only matrices among them are looked at. All by default.
        rounds, seed: of `search_permutation`; the result depends on nothing else.

    Raises:
        ValueError: no N:M pattern, or a model whose channels are not known to be free to move.
    """
    groups = parse_pattern(pattern)
    if not isinstance(groups, NM):
        raise ValueError(f"pattern={pattern!r} has no groups of columns, so there is nothing to permute: use 'N:M'")
    rows = []
    with torch.no_grad():
        for coupling, producer, consumer, name in couplings_of(model, groups, names):
            weight = consumer.weight
            groups.check(name, weight.shape)
            total = float(weight.abs().sum(dtype=torch.float64))
            if total == 0:
                continue
            block = _head_size(model) if coupling.heads else weight.shape[1]
            before = kept_magnitude(weight, groups.n, groups.m)
            order = search_permutation(weight, groups.n, groups.m, block, rounds, seed)
            _move(coupling, producer, consumer, order)
            rows.append((name, before / total, kept_magnitude(weight, groups.n, groups.m) / total))
    return PermutationReport(tuple(rows))


def couplings_of(
    model: PreTrainedModel, groups: NM, names: Collection[str] | None = None
) -> list[tuple[Coupling, nn.Linear, nn.Linear, str]]:
    """(coupling, producer, consumer, name of the consumer's weight) of every pair that can be permuted.

    Left out are heads whose channels make no whole groups, and layers that are not plain `nn.Linear`: what wraps them,
    such as an adapter, has weights of its own that would have to move, too.

    Raises:
        ValueError: the family is not known, or no pair is left.
    """
    kind = model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
    if kind not in COUPLINGS:
        raise ValueError(
            f"the channels of a {kind!r} model are not known to be free to move: leave permute_channels out, or use "
            f"one of {', '.join(COUPLINGS)}"
        )
    modules = dict(model.named_modules())
    found = []
    for coupling in COUPLINGS[kind]:
        if coupling.heads and _head_size(model) % groups.m:
            continue
        for path, producer in modules.items():
            if path.endswith(f".{coupling.producer}"):
                consumer = path.removesuffix(coupling.producer) + coupling.consumer
                name = f"{consumer}.weight"
                plain = type(producer) is type(modules[consumer]) is nn.Linear
                if plain and (names is None or name in names):
                    found.append((coupling, producer, modules[consumer], name))
    if not found:
        raise ValueError(
            "none of the matrices to prune is a plain linear layer that reads channels free to move: leave "
            "permute_channels out"
        )
    return found


def _head_size(model: PreTrainedModel) -> int:
    return model.config.hidden_size // model.config.num_attention_heads


def _move(coupling: Coupling, producer: nn.Linear, consumer: nn.Linear, order: Tensor) -> None:
    """Bring column `order[i]` of the consumer to place i, and the rows that make it with it."""
    consumer.weight.copy_(consumer.weight[:, order])
    for part in coupling.moved:
        size = producer.weight.shape[0] // coupling.parts
        rows = slice(part * size, (part + 1) * size)
        producer.weight[rows] = producer.weight[rows][order]
        if producer.bias is not None:
            producer.bias[rows] = producer.bias[rows][order]
