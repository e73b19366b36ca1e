"""Checks of the values of rows, before the first step: labels, ids and lengths that the model does not know.

A value is only suspected from the model's configuration. Whether its row really fails is found out with the trainer's
own collator and loss, so that nothing is refused which trains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import IntervalStrategy, has_length

from ..search.bench import TrialBench
from ..utils.swapped import overrides, swapped
from ..utils.wrappers import eager
from .columns import Column, chunks_of

IGNORED = -100  # the label that losses leave out
TRIED_ROWS = 8  # at most so many rows are tried at once
_LABELS = ("label", "labels", "label_ids")
_IDS = ("input_ids", "decoder_input_ids")


class _Limit(NamedTuple):
    """What a column may hold without suspicion: whole numbers from 0 to `most`, in lists of up to `longest`."""

    most: float
    longest: float
    remedy: str  # for other numbers; may hold {more}, the count of numbers that would be enough
    whole: bool = True  # whether any number of a floating type is suspected


@dataclass
class _Suspects:
    """The rows of a dataset that may fail, the worst for each reason, and some that will not."""

    worst: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)  # (column, reason) -> row, value
    clean: list[int] = field(default_factory=list)

    def add(self, column: str, reason: str, row: int, value: float) -> None:
        """Note a value, unless a worse one is known."""
        known = self.worst.get((column, reason))
        if known is None or abs(value) > abs(known[1]):
            self.worst[column, reason] = row, value


def check_values(trainer: Any, bench: TrialBench) -> None:
    """Check labels, ids and lengths of all rows against the model.

    Left alone are iterable datasets, models that are not of transformers, and trainers with a `training_step` or
    loaders of their own.

    Args:
        trainer: the `PruningTrainer`, before the run.
        bench: loads batches and restores random states.

    Raises:
        ValueError: a row fails in the trainer's own loss.
    """
    model = trainer.model
    if not isinstance(model, PreTrainedModel) or trainer.is_fsdp_enabled:
        return
    if overrides(trainer, "training_step", Trainer):
        return
    limits = _limits(model, trainer.label_names)
    own = trainer.own_loss or overrides(trainer, "prediction_step", Trainer)
    for name, dataset in _datasets(trainer).items():
        with bench.sandbox.random_state():  # rows may be drawn at random
            suspects = _suspects(dataset, limits)
        for (column, reason), (row, value) in suspects.worst.items():
            failed = _failure(trainer, bench, name, dataset, [row, *suspects.clean], math.isnan(value))
            if failed is None or (suspects.clean and _failure(trainer, bench, name, dataset, suspects.clean)):
                continue  # nothing fails, or something else does
            if not suspects.clean and own and not isinstance(failed, IndexError):
                continue  # a loss of the user's may need what only a run has, such as `state.max_steps`
            text = _text(column, reason, value, limits[column], type(model).__name__)
            raise ValueError(f"row {row} of {name} {text}") from failed


def _datasets(trainer: Any) -> dict[str, Any]:
    """Return the map-style datasets that the run will read through the trainer's collator, by name."""
    args, found = trainer.args, dict[str, Any]()
    if not overrides(trainer, "get_train_dataloader", Trainer):
        found["train_dataset"] = trainer.train_dataset
    if args.resolved().needs_selection_split:
        found["selection_dataset"] = trainer.selection_dataset
    if args.eval_strategy != IntervalStrategy.NO and not overrides(trainer, "get_eval_dataloader", Trainer):
        given = trainer.eval_dataset
        parts = given.items() if isinstance(given, dict) else ()
        found |= {f"eval_dataset[{name!r}]": part for name, part in parts} or {"eval_dataset": given}
    return {name: d for name, d in found.items() if has_length(d) and not isinstance(d, IterableDataset)}


def _limits(model: PreTrainedModel, label_names: Sequence[str]) -> dict[str, _Limit]:
    """Return what each column may hold without suspicion."""
    config, inf = model.config.get_text_config(), math.inf
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", inf)
    except NotImplementedError:  # what a model raises that has none
        rows = inf
    longest: Any = getattr(config, "max_position_embeddings", None) or inf
    limits = {"position_ids": _Limit(longest - 1, inf, "leave the column out, or shorten the rows")}
    positions = [module for name, module in model.named_modules() if "position" in name]
    if any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in positions):
        longest -= (config.pad_token_id or 0) + 1  # RoBERTa counts positions from there
    remedy = "use the tokenizer of the model, or call model.resize_token_embeddings(len(tokenizer))"
    limits |= dict.fromkeys(_IDS, _Limit(rows - 1, longest, remedy))
    remedy = "leave the column out (return_token_type_ids=False), or load the model with type_vocab_size={more}"
    limits["token_type_ids"] = _Limit((getattr(config, "type_vocab_size", None) or inf) - 1, inf, remedy)
    output = model.get_output_embeddings()
    classes: Any = model.config.num_labels if output is None else getattr(output, "out_features", inf)
    if classes == 1 or model.config.problem_type == "regression":
        classes = inf
    remedy = f"number them from 0 ({IGNORED} is left out of the loss), or load the model with num_labels={{more}}"
    longest = longest if model.config.is_encoder_decoder else inf
    limits |= dict.fromkeys(_LABELS, _Limit(classes - 1, longest, remedy, classes < inf))
    return {name: _Limit(inf, inf, "", False) for name in label_names} | limits


def _suspects(dataset: Any, limits: Mapping[str, _Limit]) -> _Suspects:
    """Return the rows with values that may not fit."""
    found = _Suspects()
    for start, columns in chunks_of(dataset, limits):
        bad = [_note(found, start, name, column, limits[name]) for name, column in columns.items()]
        if bad and len(found.clean) < TRIED_ROWS:
            count = max(len(column.lengths) for column in columns.values())
            rest = np.setdiff1d(np.arange(count), np.concatenate(bad))
            found.clean += [start + int(row) for row in rest[: TRIED_ROWS - len(found.clean)]]
    return found


def _note(found: _Suspects, start: int, name: str, column: Column, limit: _Limit) -> np.ndarray:
    """Note what may not fit in a column of a chunk, and return the rows of the chunk that hold it."""
    values, never = column.values, np.zeros(len(column.values), bool)
    floating = values.dtype.kind == "f"
    no_number = ~np.isfinite(values) if floating else never
    known = (values >= 0) & (values <= limit.most) | (values == IGNORED) & (name in _LABELS)
    reasons = {
        "no number": no_number,
        "fraction": ~no_number if floating and limit.whole else never,
        "range": never if floating else ~known & limit.whole,
    }
    for reason, wrong in reasons.items():
        if wrong.any():
            place = int(np.where(wrong, np.abs(values), -1).argmax()) if reason == "range" else int(wrong.argmax())
            found.add(name, reason, start + int(column.owners[place]), values[place].item())
    long = np.flatnonzero(column.lengths > limit.longest)
    if len(long):
        row = int(column.lengths.argmax())
        found.add(name, "length", start + row, int(column.lengths[row]))
    return np.concatenate([long, *(column.owners[wrong] for wrong in reasons.values())])


class CheckedIndices(TorchDispatchMode):
    """Raises an `IndexError` for an index out of range, where a GPU would be of no use any more to the process."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Check what is looked up, then run the operation."""
        aten = torch.ops.aten
        if func is aten.embedding.default:
            self._check(args[1], len(args[0]))
        elif func in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
            self._check(args[1][args[1] != args[4]], args[0].shape[min(1, args[0].dim() - 1)])
        elif func is aten.gather.default:
            self._check(args[2], args[0].shape[args[1]])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _check(index: Tensor, size: int) -> None:
        if index.numel() and not (index.min() >= 0 and index.max() < size):
            raise IndexError(f"indices from {int(index.min())} to {int(index.max())} are not all below {size}")


@torch.no_grad()
def _failure(
    trainer: Any, bench: TrialBench, name: str, dataset: Any, rows: Sequence[int], finite: bool = False
) -> Exception | None:
    """Return the error of the trainer's own loss on the first rows; None if there is none, or only too little memory.

    finite: whether a loss that is not finite is an error.
    """
    model, size = trainer.model, min(TRIED_ROWS, trainer.args.train_batch_size)
    try:
        # The first forward pass of a classifier notes the type of its problem in the configuration.
        undone = swapped(model.config, problem_type=model.config.problem_type)
        with bench.sandbox.random_state(), bench.sandbox.alone(), undone, eager():
            model.eval()
            (inputs,) = bench.batches.load(dataset, size, rows[:size])
            with trainer.compute_loss_context_manager(), CheckedIndices():
                if name.startswith("eval_dataset"):
                    loss, _, _ = trainer.prediction_step(model, inputs, prediction_loss_only=True)
                else:
                    items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
                    loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=items)
    except Exception as error:  # whatever the user's collator, model or loss raises
        return None if should_reduce_batch_size(error) else error
    if finite and isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all()):
        return FloatingPointError(f"the loss is {float(loss.mean())}")
    return None


def _text(column: str, reason: str, value: float, limit: _Limit, model: str) -> str:
    """Return what is wrong with a value, and how to mend it."""
    if reason == "length":
        return (
            f"has {value} entries in {column}, and {model} has {limit.longest} positions: cut them with "
            f"truncation=True and max_length={limit.longest} of the tokenizer"
        )
    if reason == "no number":
        return f"has no finite number in {column} ({value}): give it a value, or leave the row out"
    if reason == "fraction":
        return (
            f"has {column}={value} of a floating type, and {model} takes whole numbers: cast the column to int64, or "
            "load the model with num_labels=1 for a regression"
        )
    return f"has {column}={value}, and {model} knows 0 to {limit.most}: {limit.remedy.format(more=max(value, 0) + 1)}"
