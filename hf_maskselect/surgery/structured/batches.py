"""Rows as padded batches of what a model takes, and which of their positions are real."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ...utils.token_limits import TokenLimits, longest_row

Batch = dict[str, Tensor]
ROWS = 32  # of one batch
_KEYS = ("attention_mask", "token_type_ids")
FEWEST = 8  # rows to fit or choose on


def rows_of(rows: Iterable[Mapping[str, Any]], model: PreTrainedModel) -> list[Batch]:
    """Return rows, or batches of rows, as single rows: tensors of what the model takes, without labels.

    Raises:
        ValueError: there are fewer than 8, a row is no mapping, empty or too long, or its ids are not of this model.
    """
    name, kept = model.main_input_name, []
    takes = inspect.signature(model.forward).parameters
    limits = TokenLimits.of(model) if name == "input_ids" else None
    axes = 3 if name == "pixel_values" else 2 if "MultipleChoice" in type(model).__name__ else 1
    for row in rows:
        if not isinstance(row, Mapping) or name not in row:
            raise ValueError(f"a row is {type(row).__name__} without {name}: give tokenized rows of the train split")
        tensors = {key: torch.as_tensor(row[key]) for key in (name, *_KEYS) if key in row and key in takes}
        if limits is not None:
            limits.check(tensors[name], "a row")
            tensors.setdefault("attention_mask", torch.ones_like(tensors[name]))
        if tensors[name].dim() == axes:
            kept.append(_without_padding(tensors))
        else:
            single = ({key: value[index] for key, value in tensors.items()} for index in range(len(tensors[name])))
            kept += map(_without_padding, single)
    if len(kept) < FEWEST:
        raise ValueError(
            f"{len(kept)} rows are too few to fit a model: give tokenized rows of the train split, such as 2,000"
        )
    return kept


def _without_padding(row: Batch) -> Batch:
    """Cut what lies behind the last real position: padding is no row to fit on, and counts in no limit."""
    if "attention_mask" not in row:
        return row
    real = row["attention_mask"].reshape(-1, row["attention_mask"].shape[-1]).any(0).nonzero()
    end = int(real.max()) + 1 if len(real) else row["attention_mask"].shape[-1]
    return {key: value[..., :end] for key, value in row.items()}


def batches_of(rows: Sequence[Batch], model: PreTrainedModel) -> list[Batch]:
    """Return batches of 32 rows of about the same length, on the model's device."""
    name = model.main_input_name
    ordered = sorted(rows, key=lambda row: row[name].shape[-1])
    return [_padded(ordered[start : start + ROWS], model) for start in range(0, len(ordered), ROWS)]


def real_positions(values: Tensor, batch: Batch) -> Tensor:
    """Reshape `(rows, positions, features)` to `(real positions, features)`, in float32 or better."""
    values = values.reshape(-1, values.shape[-1]).to(torch.promote_types(values.dtype, torch.float32))
    mask = batch.get("attention_mask")
    return values if mask is None else values[mask.flatten().bool()]


def timed_batch(row: Batch, model: PreTrainedModel, shape: Sequence[int]) -> Batch:
    """Return a batch to time, of (batch size, length): random tokens without padding, or the row again and again.

    Raises:
        ValueError: the shape is none, or longer than the model's positions.
    """
    size, length = shape
    name = model.main_input_name
    if min(size, length) < 1:
        raise ValueError(f"latency_shape={tuple(shape)} must be a batch size and a length above 0, such as (8, 128)")
    if name != "input_ids":
        return {name: torch.stack([row[name]] * size)}
    longest = longest_row(model)
    if length > longest:
        raise ValueError(
            f"latency_shape has length {length}, but the model has {longest} positions: give a shorter one"
        )
    words = model.config.vocab_size
    ids = torch.randint(
        words // 2, words, (size, *row[name].shape[:-1], length), generator=torch.Generator().manual_seed(0)
    )
    return {name: ids, "attention_mask": torch.ones_like(ids)}


def _padded(rows: Sequence[Batch], model: PreTrainedModel) -> Batch:
    name, batch = model.main_input_name, {}
    longest = max(row[name].shape[-1] for row in rows)
    for key in rows[0]:
        filler = (model.config.pad_token_id or 0) if key == "input_ids" else 0
        values = [pad(row[key], (0, longest - row[name].shape[-1]), value=filler) for row in rows]
        batch[key] = torch.stack(values).to(model.device)
    return batch
