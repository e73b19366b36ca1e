"""Batches that a resumed run draws as the uninterrupted one would, also where their order or content is random."""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, Trainer

from ..masking.tensor_files import TensorFile
from ..utils.files import replacing
from ..utils.reading import parse_json, typed
from ..utils.swapped import swapped

_REMEDY = "restore it, or resume from another checkpoint"
States = tuple[Tensor, Any, Any]  # of torch on the CPU, NumPy and Python


def batches_file(rank: int) -> str:
    """Return the name of the file with the random states of a process's batches."""
    return f"rng_batches_{rank}.safetensors"


class RepeatableBatches(Trainer):
    """A `Trainer` whose checkpoints also know the random states from which batches are drawn.

    These are two: that of the start of the epoch, from which a sampler draws the order, and that before the last call
    of the collator. Its batch is already made when a checkpoint is written, for the next step. A resume draws the
    order and that batch again and then goes on from the random state of the checkpoint, as the uninterrupted run did.
    """

    _epoch_start: States | None = None
    _last_batch: States | None = None
    _restored: list[Callable[[], None]] = []  # before the first and the second batch after a resume
    _in_order = False  # whether the checkpoint's random state was taken before the second batch

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, *args, **kwargs):
        options = dataset, description, batch_size, sampler_fn, is_training, *args
        collator = self.data_collator
        if not is_training:
            return super()._get_dataloader(*options, **kwargs)
        if self.args.dataloader_num_workers:  # they draw from random states of their own
            if isinstance(collator, DataCollatorForLanguageModeling) and collator.mlm:
                warnings.warn(
                    "masked tokens are drawn in the workers of the data loader, so a resumed run will not equal this "
                    "one to the bit: set dataloader_num_workers=0 if it must",
                    stacklevel=2,
                )
            return super()._get_dataloader(*options, **kwargs)

        def collate(rows: list[Any]) -> Any:
            if self._restored:
                self._restored.pop(0)()
            self._last_batch = _random_states()
            return collator(rows)

        with swapped(self, data_collator=collate):
            return super()._get_dataloader(*options, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        checkpoint, batches = kwargs["resume_from_checkpoint"], kwargs["steps_trained_in_current_epoch"]
        self._restored, self._in_order = [], False
        if checkpoint is not None and kwargs["epoch"] == kwargs["epochs_trained"] and batches:
            self._rewind(Path(checkpoint))
        self._epoch_start = _random_states()
        super()._run_epoch(*args, **kwargs)

    def _rewind(self, checkpoint: Path) -> None:
        """Prepare to draw the batches of the epoch again; an earlier version has not written their random states."""
        path = checkpoint / batches_file(self.args.process_index)
        if not path.is_file():
            return

        def go_on() -> None:
            self._load_rng_state(str(checkpoint))
            self._in_order = True

        epoch_start, last_batch = _read(path)
        if epoch_start is not None:
            _set_random_states(epoch_start)
        if last_batch is not None:
            self._restored = [lambda: _set_random_states(last_batch), go_on]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # `Trainer` calls it after the first batches of a resume, of which the second has gone on from there already.
        if not self._in_order:
            super()._load_rng_state(checkpoint)
        self._restored, self._in_order = [], False

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._epoch_start is not None:
            _write(Path(output_dir) / batches_file(self.args.process_index), self._epoch_start, self._last_batch)


def _random_states() -> States:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_states(states: States) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def _write(path: Path, *states: States | None) -> None:
    tensors, texts = {}, {}
    for index, state in enumerate(states):
        if state is not None:
            tensors[str(index)] = state[0]
            name, keys, *rest = state[1]
            texts[str(index)] = json.dumps([[name, keys.tolist(), *rest], state[2]])
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=texts)


def _read(path: Path) -> list[States | None]:
    """Read what `_write` wrote; raises a ValueError if the file is damaged."""
    file = TensorFile(path, "random states", _REMEDY)
    tensors, found = file.tensors(), list[States | None]()
    for index in ("0", "1"):
        if index not in file.metadata:
            found.append(None)
            continue
        numpy_state, python_state = typed(
            parse_json(file.metadata[index], path, _REMEDY), list[list[Any]], path, _REMEDY
        )
        version, words, following = python_state
        found.append((tensors[index], tuple(numpy_state), (version, tuple(words), following)))
    return found
