"""The held-out rows that a run chooses on. They come from train, never from the data that is reported."""

from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available

from ..config import PruningConfig
from ..utils.seeds import key_seed


class RowSplit:
    """Splits the user's train rows, again for every run whose arguments or rows have changed."""

    def __init__(self) -> None:
        self._given: tuple[Any, Any] = (None, None)  # the user's train and selection rows
        self._made: tuple[Any, Any] = (None, None)  # those that the last split made of them

    def changed(self, train: Any, selection: Any) -> bool:
        """Whether the user has assigned other rows since the last split."""
        return train is not self._made[0] or selection is not self._made[1]

    def split(self, args: PruningConfig, train: Any, selection: Any) -> tuple[Any, Any]:
        """Return (train rows, held-out rows).

        Args:
            args: say whether rows are held out, how many, and the seed.
            train: the train rows as they are now: the user's, or those of the last split.
            selection: the held-out rows as they are now; None to hold rows out of `train`.

        Raises:
            ValueError: rows cannot be drawn from a dataset, or none are left to choose on.
        """
        pairs = zip((train, selection), self._made, self._given, strict=True)
        self._given = tuple(given if now is made else now for now, made, given in pairs)
        self._made = selection_rows(args, *self._given)
        return self._made


def selection_rows(args: PruningConfig, train: Any, selection: Any) -> tuple[Any, Any]:
    """Return (train rows, held-out rows): the user's, or train split in two if the run chooses and has no others."""
    for name, dataset in (("train_dataset", train), ("selection_dataset", selection)):
        if isinstance(dataset, dict) and 0 not in dataset:
            raise ValueError(
                f"{name} is a {type(dataset).__name__} of {', '.join(map(repr, dataset)) or 'nothing'}, not one "
                "dataset: pass one of these"
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


def hold_out(dataset: Any, fraction: float, seed: int, most: int) -> tuple[Dataset, Dataset]:
    """Return (rest, held-out rows): a seeded random share, at most `most` rows, the same on every rank.

    Raises:
        ValueError: the dataset is not map-style, or one of the parts would be empty.
    """
    if lack := _lack(dataset):
        raise ValueError(f"train_dataset {lack}, so no rows can be held out of it: pass a map-style dataset")
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


def _lack(dataset: Any) -> str:
    """Why rows cannot be drawn from a dataset; empty for a map-style one."""
    if not has_length(dataset):
        return "has no length"
    return "is an IterableDataset, whose rows come in its own order" if isinstance(dataset, IterableDataset) else ""
