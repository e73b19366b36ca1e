"""The numbers in the columns of a dataset, read in chunks of rows."""

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers.utils import is_datasets_available

CHUNK = 10_000  # rows that are read at once
MOST_SECONDS = 10.0  # for the rows of a dataset that makes them one by one
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class Column(NamedTuple):
    """The numbers of a column in a chunk of rows."""

    values: np.ndarray  # flat
    owners: np.ndarray  # the row in the chunk that each value belongs to
    lengths: np.ndarray  # the longest innermost list of each row; 0 for a plain number


def chunks_of(dataset: Any, names: Collection[str]) -> Iterator[tuple[int, dict[str, Column]]]:
    """Yield the first row of each chunk, and those of the named columns that hold numbers.

    A `datasets.Dataset` is read from its table. The rows of a user's own class are read for at most `MOST_SECONDS`,
    and not at all where it has a generator of its own, which would move on.

    Args:
        dataset: map-style, of dictionaries; of anything else nothing is yielded.
        names: the columns to read, where there are such.
    """
    if is_datasets_available():
        import datasets

        if isinstance(dataset, datasets.Dataset):
            known = [name for name in names if name in dataset.column_names]
            for start in range(0, len(dataset) if known else 0, CHUNK):
                table = dataset.with_format("arrow", columns=known)[start : start + CHUNK]
                yield start, _of_numbers({name: _of_arrow(table.column(name)) for name in known})
            return
    base = dataset
    while isinstance(base, Subset):
        base = base.dataset
    listed, deadline = isinstance(base, list | tuple), time.monotonic() + MOST_SECONDS
    if not listed and any(isinstance(value, _GENERATORS) for value in getattr(base, "__dict__", {}).values()):
        return
    step = CHUNK if listed else CHUNK // 100
    for start in range(0, len(dataset), step):
        rows = [dataset[row] for row in range(start, min(start + step, len(dataset)))]
        if not all(isinstance(row, Mapping) for row in rows) or not (listed or time.monotonic() < deadline):
            return
        known = [name for name in names if name in rows[0]]
        yield start, _of_numbers({name: _of_rows([row.get(name, ()) for row in rows]) for name in known})


def _of_numbers(columns: Mapping[str, Column | None]) -> dict[str, Column]:
    return {name: column for name, column in columns.items() if column is not None}


def _of_rows(values: Sequence[Any]) -> Column | None:
    """Return a column of Python numbers, lists, arrays or tensors; None if it holds something else."""
    try:
        arrays = [_array(value) for value in values]
    except (TypeError, ValueError):  # a dtype that NumPy lacks, or lists of several lengths
        return None
    if not all(array.dtype.kind in "biuf" for array in arrays):
        return None
    owners = np.repeat(np.arange(len(arrays)), [array.size for array in arrays])
    lengths = np.array([array.shape[-1] if array.ndim else 0 for array in arrays])
    return Column(np.concatenate([array.ravel() for array in arrays]), owners, lengths)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        return value.numpy(force=True)
    return np.asarray(np.nan if value is None else value)


def _of_arrow(column: Any) -> Column | None:
    """Return a column of the table of a `datasets.Dataset`; None if it holds no numbers."""
    from pyarrow import compute, types  # comes with datasets

    array = column.combine_chunks()
    owners, lengths = np.arange(len(array)), np.zeros(len(array), int)
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        counts = compute.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        lengths = np.zeros(len(column), int)
        np.maximum.at(lengths, owners, counts)
        owners, array = np.repeat(owners, counts), array.flatten()
    if not (types.is_integer(array.type) or types.is_floating(array.type)):
        return None
    return Column(array.to_numpy(zero_copy_only=False), owners, lengths)
