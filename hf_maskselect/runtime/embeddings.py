"""Token embeddings in 8 bits: most of the weights of a small pruned encoder, of which a call reads few rows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..storage.packed_file import quantize_rows
from .linears import Unsaved

# How token embeddings are stored: 8 bits and a scale a token; float32; float32 because an output head shares them.
INT8, FLOAT32, TIED = "int8", "float32", "tied"


@dataclass(frozen=True)
class Int8Table:
    """Token embeddings in 8 bits.

    Args:
        values: int8 (tokens, width).
        scales: float32 (tokens,), one a row.
    """

    values: Tensor
    scales: Tensor


class Int8Embedding(Unsaved):
    """Looks up token embeddings in 8 bits. Takes token ids of any shape, returns float32 (..., width)."""

    def __init__(self, table: Int8Table, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.values.shape
        self.padding_idx = padding_idx
        self._values, self._scales = table.values, table.scales[:, None]

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up; raises an IndexError for an id that is no token, as `nn.Embedding` does."""
        rows = nn.functional.embedding(input, self._values).float()
        return rows.mul_(nn.functional.embedding(input, self._scales))

    @property
    def weight(self) -> Tensor:
        """The whole table in float32, computed at each access."""
        return self._values * self._scales

    def extra_repr(self) -> str:
        """Name the sizes, as `nn.Embedding` does."""
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


def int8_tables(model: PreTrainedModel) -> dict[str, Int8Table]:
    """Return the token embeddings in 8 bits, by the name of their module.

    The result is empty if they must stay exact: an output head shares them, or they are not ordinary.
    """
    return {
        name: Int8Table(*quantize_rows(embedding.weight.detach()))
        for name, embedding in _token_embeddings(model).items()
        if not shared(model, name) and _is_ordinary(embedding)
    }


def storage_of(model: PreTrainedModel, plans: Mapping[str, object]) -> dict[str, str]:
    """Return how the token embeddings are stored, by the name of their module. plans: those of the CPU model."""
    return {
        name: INT8 if name in plans else TIED if shared(model, name) else FLOAT32 for name in _token_embeddings(model)
    }


def shared(model: nn.Module, name: str) -> bool:
    """Return whether another module of the model, such as an output head, has the weight of this one too."""
    weight = model.get_parameter(f"{name}.weight")
    return sum(each is weight for _, each in model.named_parameters(remove_duplicate=False)) > 1


def _token_embeddings(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Return the module of the token embeddings by its name; nothing for a model without one."""
    module = model.get_input_embeddings()
    return {name: each for name, each in model.named_modules() if each is module and isinstance(each, nn.Embedding)}


def _is_ordinary(embedding: nn.Embedding) -> bool:
    """Return whether a look-up gives rows of the weight as they are, and 8 bits can hold these."""
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    return plain and bool(torch.isfinite(embedding.weight).all())
