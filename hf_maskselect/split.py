"""The rows a run chooses on: held out of train, never the data that is reported."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset, Subset
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from .proposals import key_seed


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(rest, held out): a seeded random share of a map-style dataset, the same on every rank.

    Raises:
        ValueError: the dataset has no length, or one of the parts would be empty.
    """
    if not has_length(dataset):
        raise ValueError(
            "train_dataset has no length, so no selection split can be held out of it: pass a map-style dataset"
        )
    rows = len(dataset)
    count = round(rows * fraction)
    if not 0 < count < rows:
        raise ValueError(
            f"selection_fraction={fraction} of {rows} train rows leaves one part empty: raise it, or pass "
            "selection_dataset"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(key_seed(seed, "selection"))).tolist()
    held, rest = sorted(order[:count]), sorted(order[count:])
    if is_datasets_available():
        import datasets

        if isinstance(dataset, datasets.Dataset):
            return dataset.select(rest), dataset.select(held)
    return Subset(dataset, rest), Subset(dataset, held)
