"""Batches for trials, refits and scores: the trainer's rows, order and collator, none of which they move on."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import is_datasets_available

from .borrowed import BorrowedTrainer, Inputs


class Batches:
    """Loads rows of the train split and the held-out rows.

    Args:
        trainer: owns the data and the collator.
        held_out: the rows that candidates are scored on; None when nothing is chosen.
        copies: whether any batch will be loaded. Then the collator, which may draw, is copied now, so that the
            held-out rows look the same at every score.

    Raises:
        ValueError: the collator cannot be copied.
    """

    def __init__(self, trainer: BorrowedTrainer, held_out: Any, copies: bool) -> None:
        self._trainer, self.held_out, self._copies = trainer, held_out, copies
        self._collator: Any = None
        self._by_length: tuple[Any, list[int]] | None = None  # the held-out rows, their order
        self.copy_collator()

    def copy_collator(self) -> None:
        """Copy the collator as it is now, unless this one has been copied."""
        trainer = self._trainer
        if self._copies and trainer.data_collator is not self._collator:
            self._collator, self.first_collator = (
                trainer.data_collator,
                _copy_of(trainer.data_collator, trainer.model),
            )

    def rows_per_step(self) -> int:
        """Return the rows of a trial step: by default those of a training step, whatever the number of devices."""
        return self._trainer.args.trial_batch_size or self.rows_of_training()

    def rows_of_training(self) -> int:
        """Return the rows of one optimizer step of the training, over all devices."""
        args = self._trainer.args
        accelerator: Any = args.accelerator_config
        devices = 1 if accelerator.split_batches else args.world_size
        return self._trainer._train_batch_size * args.gradient_accumulation_steps * devices

    def steps_per_epoch(self) -> int:
        """Return the trial steps of one pass over the train split."""
        return max(1, len(self._trainer.train_dataset) // self.rows_per_step())

    def of_training(self, steps: int) -> Iterator[list[Inputs]]:
        """Yield the micro-batches of each of `steps` trial steps, in the order of the trainer's own sampler."""
        trainer, rows = self._trainer, self.rows_per_step()
        micro = min(trainer._train_batch_size, rows)
        while True:
            loader = iter(self.load(trainer.train_dataset, micro, trainer._get_train_sampler(trainer.train_dataset)))
            while group := list(itertools.islice(loader, -(-rows // micro))):
                yield group
                steps -= 1
                if steps == 0:
                    return

    def of_held_out(self, rows: Iterable[int] | None = None) -> DataLoader:
        """Return the held-out rows in batches of `per_device_eval_batch_size`, the same at every call.

        rows: their order; by default that of the dataset, which a metric may know.
        """
        size = self._trainer.args.per_device_eval_batch_size
        # This loader knows when it ends, which metrics of batches ask for.
        return self.load(self.held_out, size, rows, self.first_collator, DataLoaderShard)

    def held_out_by_length(self) -> list[int]:
        """Return the held-out rows' indices, the shortest row first, so that batches hold little padding.

        Rows that have no length keep their order. All are read at the first call: make it inside `random_state`.
        """
        if self._by_length is None or self._by_length[0] is not self.held_out:
            model, count = self._trainer.model, len(self.held_out)
            name = model.main_input_name if isinstance(model, PreTrainedModel) else "input_ids"
            lengths = [_length_of(self.held_out[row], name) for row in range(count)]
            self._by_length = self.held_out, sorted(range(count), key=lengths.__getitem__)
        return self._by_length[1]

    def load(
        self,
        dataset: Any,
        batch_size: int,
        rows: Iterable[int] | None = None,
        collator: Callable | None = None,
        kind: type[DataLoader] = DataLoader,
    ) -> DataLoader:
        """Return a loader of `rows` of a dataset, by default of all in order.

        accelerate does not prepare it, since that would shard it. It has its own generator and its own copy of the
        collator, so that it leaves the global generator and a collator that draws (masked language modelling) alone.
        """
        trainer = self._trainer
        collate = _copy_of(trainer.data_collator if collator is None else collator, trainer.model)
        if is_datasets_available():
            import datasets

            if isinstance(dataset, datasets.Dataset):
                dataset = trainer._remove_unused_columns(dataset, description="search")
            else:
                collate = trainer._get_collator_with_removed_columns(collate, description="search")
        generator = torch.Generator().manual_seed(0)
        return kind(dataset, batch_size=batch_size, sampler=rows, collate_fn=collate, generator=generator)


def _length_of(row: Any, name: str) -> int:
    value = row.get(name) if isinstance(row, Mapping) else None
    return len(value) if isinstance(value, Sized) else 0


def _copy_of(collator: Callable, model: nn.Module) -> Callable:
    """Return a deep copy that shares its models: a collator may hold one, to make a decoder's inputs with it.

    Shared are the trained model, and any in a field of a dataclass, as the collators of transformers are.
    """
    values = [getattr(collator, f.name) for f in fields(collator)] if is_dataclass(collator) else []
    shared = [model, *(value for value in values if isinstance(value, nn.Module))]
    try:
        return copy.deepcopy(collator, {id(module): module for module in shared})
    except Exception as error:  # an object that cannot be copied raises whatever it likes
        raise ValueError(
            f"the data collator, a {type(collator).__name__}, cannot be copied ({error}), but trials, gradient "
            "samples, refits and scores must not change that of the training: give it a __deepcopy__, or use "
            "method='magnitude' with refit_rows=0 and level_eval_steps=0"
        ) from error
