"""Which token ids a model takes, and how many in a row."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class TokenLimits:
    """The limits of a model's inputs.

    tokens: number of rows of its embedding table. length: of the longest row; infinity if there is no limit.
    """

    tokens: int
    length: float

    @classmethod
    def of(cls, model: Any) -> "TokenLimits":
        """Read them from a transformers model that takes token ids."""
        return cls(len(model.get_input_embeddings().weight), longest_row(model))

    def check(self, ids: Tensor, what: str) -> None:
        """Raise a ValueError if a row is empty, too long, or of another tokenizer.

        ids: int64 (..., length). what: begins the message, such as "a row".
        """
        if not 0 < ids.shape[-1] <= self.length:
            raise ValueError(
                f"{what} has {ids.shape[-1]} tokens, but the model takes 1 to {self.length}: leave empty rows out, "
                "and tokenize with truncation=True"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.tokens:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(
                f"{what} holds the token id {wrong}, but the model has {self.tokens} tokens: use the model's own "
                "tokenizer"
            )


def longest_row(model: nn.Module) -> float:
    """Return how many tokens the positions of a transformers model allow; infinity if its configuration has no limit.

    RoBERTa and MPNet count positions from the id of the padding token on. Two of their 514 positions are never used.
    """
    config: Any = model.config
    count = getattr(config, "max_position_embeddings", None) or math.inf
    for name, module in model.named_modules():
        positions = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if positions and module.padding_idx is not None:
            return count - module.padding_idx - 1
    return count
