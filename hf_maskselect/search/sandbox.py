"""A sandbox around the trainer's own model: what happens inside leaves the run untouched, to the bit."""

import contextlib
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..masking.maskset import MaskSet
from ..methods.base import Method
from ..utils.swapped import swapped
from .borrowed import BorrowedTrainer


class Sandbox:
    """Restores the weights, masks, random states and settings of a run after trials on its unwrapped model."""

    def __init__(self, trainer: BorrowedTrainer, method: Method) -> None:
        self._trainer, self._method = trainer, method
        self.saved: dict[str, Tensor] = {}  # weights and buffers at the moment when `untouched` was entered

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Restore weights, masks and random states on leaving; costs one copy of the trained weights."""
        masked = self._method.weights.keys()  # frozen weights too
        changed = {n: p for n, p in self._parameters() if p.requires_grad or n in masked}
        self.saved = {n: t.detach().clone() for n, t in (*changed.items(), *self._trainer.model.named_buffers())}
        with self.random_state(), tempfile.TemporaryDirectory() as folder:
            masks = Path(folder) / "masks.safetensors"  # on disk, where they need no memory
            self._method.masks.save(masks)
            try:
                yield
            finally:
                self.restore()
                self._method.set_masks(MaskSet.load(masks)[0])
                self.saved = {}

    def restore(self) -> None:
        """Set weights and buffers to their values at the moment when `untouched` was entered."""
        self.put(self.saved)

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights and buffers into the model, by name."""
        for name, tensor in self._tensors():
            if name in weights:
                tensor.copy_(weights[name])

    def trained(self) -> dict[str, Tensor]:
        """Return the current value of all that a trial may change (views, not copies); only inside `untouched`."""
        return {n: t.detach() for n, t in self._tensors() if n in self.saved}

    def of_layers(self, weights: Mapping[str, object]) -> dict[str, Tensor]:
        """Return the parameters (views) of the layers whose weights are named, biases too."""
        layers = {name.removesuffix("weight") for name in weights}
        return {n: p.detach() for n, p in self._parameters() if n.rpartition(".")[0] + "." in layers}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._parameters()
        yield from self._trainer.model.named_buffers()

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter once; tied matrices have the name that their mask has."""
        names = {id(weight): name for name, weight in self._method.weights.items()}
        return ((names.get(id(p), n), p) for n, p in self._trainer.model.named_parameters())

    @contextlib.contextmanager
    def random_state(self) -> Iterator[None]:
        """Restore the random states of torch, Python and NumPy and the model's train or eval mode on leaving."""
        python_state, numpy_state, training = random.getstate(), np.random.get_state(), self._trainer.model.training
        devices = [self._trainer.args.device] if self._trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                random.setstate(python_state)
                np.random.set_state(numpy_state)
                self._trainer.model.train(training)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Count and gather on this process only inside: the other processes run other trials."""
        names = ("gather", "gather_for_metrics", "pad_across_processes", "reduce", "wait_for_everyone")
        trainer, own = self._trainer, dict.fromkeys(names, _own)
        with swapped(trainer.args, average_tokens_across_devices=False), swapped(trainer.accelerator, **own):
            yield


def _own(value: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return what this process has, in place of a collective."""
    return value


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, use kernels that add in a fixed order: all processes must get the same statistics, to the bit."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
