"""The rows a run chooses on: held out of train, never the data that is reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from ..utils.seeds import key_seed

if TYPE_CHECKING:
    from ..config import PruningConfig


def selection_rows(
    args: PruningConfig, train: Dataset | None, selection: Dataset | None
) -> tuple[Dataset | None, Dataset | None]:
    """(what is trained on, what is chosen on): as given, or held out where the run chooses and was given none.

    Raises:
        ValueError: rows that cannot be drawn from, or none to choose on.
    """
    for name, given in (("train_dataset", train), ("selection_dataset", selection)):
        if isinstance(given, dict) and 0 not in given:
            raise ValueError(
                f"{name} is a {type(given).__name__} of {', '.join(map(repr, given)) or 'nothing'}, not one dataset: "
                "pass one of these"
            )
    if train is None:
        return train, selection
    settings = args.resolved()
    if settings.needs_selection_split and selection is None:
        train, selection = hold_out(train, args.selection_fraction, args.seed, args.max_selection_samples)
    elif settings.needs_selection_split and (lack := _lack(selection)):
        raise ValueError(
            f"selection_dataset {lack}, but every candidate is scored on all of it: pass a map-style dataset"
        )
    elif settings.needs_selection_split and len(selection) == 0:
        raise ValueError("selection_dataset is empty: give it rows to choose on, or leave it out to hold out a split")
    if (settings.searches or settings.criterion != "magnitude" or settings.refit_rows) and (lack := _lack(train)):
        raise ValueError(
            f"train_dataset {lack}, but trials, gradient samples and refits draw random rows: pass a map-style "
            "dataset, or use method='magnitude' with refit_rows=0"
        )
    return train, selection


def hold_out(dataset: Dataset, fraction: float, seed: int, most: int) -> tuple[Dataset, Dataset]:
    """(rest, held out): a seeded random share of a map-style dataset, at most `most` rows, the same on every rank.

    Raises:
        ValueError: the dataset is not map-style, or one of the parts would be empty.
    """
    if lack := _lack(dataset):
        raise ValueError(
            f"train_dataset {lack}, so no selection split can be held out of it: pass a map-style dataset"
        )
    rows = len(dataset)
    count = min(round(rows * fraction), most)
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


def _lack(dataset: Dataset) -> str:
    """What keeps rows from being drawn from a dataset; empty for a map-style one."""
    if not has_length(dataset):
        return "has no length"
    return "is an IterableDataset, whose rows come in its own order" if isinstance(dataset, IterableDataset) else ""
