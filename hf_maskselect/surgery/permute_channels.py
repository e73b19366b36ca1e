"""Reordering of hidden channels, so that an N:M pattern keeps more magnitude while the function stays the same.

A channel can move if exactly one layer produces it and exactly one reads it: the inner channels of a feed-forward
block, and the value channels inside each attention head. The rows of the producer (and its bias) and the columns of
the consumer move together, so that the outputs change by rounding only.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..masking.patterns import NM, parse_pattern
from ..utils.tables import text_table
from ..utils.wrappers import plain_model
from .column_order import kept_magnitude, search_permutation


@dataclass(frozen=True)
class Coupling:
    """Two linear layers, by their names in a block, and the channels between them.

    The rows of the producer consist of equal `parts` (2 in a gated block, 3 in a fused attention), of which `moved`
    produce the channels. With `heads`, channels must stay inside their attention head.
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
    "mpnet": (Coupling("attention.attn.v", "attention.attn.o", heads=True), _BERT[1]),
    "vit": (Coupling("attention.v_proj", "attention.o_proj", heads=True), Coupling("mlp.fc1", "mlp.fc2")),
    "modernbert": (
        Coupling("attn.Wqkv", "attn.Wo", parts=3, moved=(2,), heads=True),
        Coupling("mlp.Wi", "mlp.Wo", parts=2, moved=(0, 1)),
    ),
}


@dataclass(frozen=True)
class PermutationReport:
    """Rows (name of a weight, kept magnitude before, after); magnitudes are shares of that of the whole matrix."""

    rows: tuple[tuple[str, float, float], ...]

    @property
    def mean_gain(self) -> float:
        """Mean relative gain in kept magnitude over the matrices; 0.01 is one percent."""
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

    Call it on the dense model before training. A matrix that holds the pattern already keeps its order.

    Args:
        model: a BERT-family model of transformers.
        pattern: `"N:M"`.
        names: parameters (`"...weight"`) that will be pruned; the others keep their order. Defaults to all.
        rounds: largest number of rounds of the search.
        seed: seed of the search; the result depends on nothing else.

    Raises:
        ValueError: `pattern` is no N:M pattern, or the model has no channels that are known to be free to move.
    """
    model, groups = plain_model(model), parse_pattern(pattern)
    if not isinstance(groups, NM):
        raise ValueError(f"pattern={pattern!r} has no groups of columns to permute: use 'N:M'")
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
    """List (coupling, producer, consumer, name of the consumer's weight) of every pair that can be permuted.

    Attention heads whose channels do not fill whole groups are left out. So are layers that are not plain `nn.Linear`:
    a wrapper such as an adapter has weights of its own that would have to move, too.

    Raises:
        ValueError: the family of the model is not known, or no pair is left.
    """
    kind = model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
    if kind not in COUPLINGS:
        raise ValueError(
            f"the channels of a {kind!r} model are not known to be free to move: use one of {', '.join(COUPLINGS)}"
        )
    modules = dict(model.named_modules())
    pairs = []
    for coupling in COUPLINGS[kind]:
        if coupling.heads and _head_size(model) % groups.m:
            continue
        for path, producer in modules.items():
            if path.endswith(f".{coupling.producer}"):
                consumer = path.removesuffix(coupling.producer) + coupling.consumer
                name = f"{consumer}.weight"
                plain = type(producer) is type(modules[consumer]) is nn.Linear
                if plain and (names is None or name in names):
                    pairs.append((coupling, producer, modules[consumer], name))
    if not pairs:
        raise ValueError(
            "none of the matrices to prune is a plain linear layer that reads channels free to move: do without "
            "permute_channels"
        )
    return pairs


def _head_size(model: PreTrainedModel) -> int:
    return model.config.hidden_size // model.config.num_attention_heads


def _move(coupling: Coupling, producer: nn.Linear, consumer: nn.Linear, order: Tensor) -> None:
    """Move column `order[i]` of the consumer to place `i`, and the rows that produce it."""
    consumer.weight.copy_(consumer.weight[:, order])
    for part in coupling.moved:
        size = producer.weight.shape[0] // coupling.parts
        rows = slice(part * size, (part + 1) * size)
        producer.weight[rows] = producer.weight[rows][order]
        if producer.bias is not None:
            producer.bias[rows] = producer.bias[rows][order]
