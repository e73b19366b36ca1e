"""How long a row may be."""

import math
from typing import Any

from torch import nn


def longest_row(model: nn.Module) -> float:
    """Return how many tokens the positions of a transformers model allow; infinity if its configuration has no limit.

    RoBERTa and its kin count positions from the padding token's on, so that two of 514 are never used.
    """
    config: Any = model.config
    count = getattr(config, "max_position_embeddings", None) or math.inf
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return count - module.padding_idx - 1
    return count
