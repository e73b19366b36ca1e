"""A sandbox around the trainer's own model: what happens inside leaves the run untouched, to the bit."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..masking.dtensors import local_rows, reshard
from ..methods.base import Method
from ..utils.swapped import swapped
from .borrowed import BorrowedTrainer


class Sandbox:
    """Restores the weights, masks, random states and settings of a run after trials on its unwrapped model.

    It also makes a change of the run one act, which is done as a whole or not at all.
    """

    def __init__(self, trainer: BorrowedTrainer, method: Method) -> None:
        self._trainer, self._method = trainer, method
        self.saved: dict[str, Tensor] = {}  # weights and buffers at the moment when `untouched` was entered
        self._undo: dict[str, Tensor] = {}  # local rows of the same, on the CPU, inside `undone_on_error`

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Undo what has changed inside if it ends in an error or an interruption, and raise that.

        Weights, buffers, masks, the method's state and the random states go back to what they were, and gradients to
        none. Costs one copy of the trained weights in CPU memory. Where the model is on the CPU, `untouched` and
        refits use that copy as theirs.
        """
        reshard(self._trainer.model)
        self._method.restore_trained()
        self._undo = {n: local_rows(t.detach()).to("cpu", copy=True) for n, t in self._changeable()}
        method_back, random_back = self._method.remember(), self._remember_random_state()
        try:
            yield
        except BaseException:
            reshard(self._trainer.model)
            for name, tensor in self._changeable():
                local_rows(tensor.detach()).copy_(self._undo[name])
            method_back()
            random_back()
            self._trainer.model.zero_grad()
            raise
        finally:
            self._undo = {}

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Restore weights, masks and random states on leaving; costs one copy of the trained weights."""
        self.saved = self.copied(self._changeable())
        method_back = self._method.remember()
        with self.random_state():
            try:
                yield
            finally:
                self.restore()
                method_back()
                self.saved = {}

    def _changeable(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a trial or a cut may change: trained weights, masked ones (also frozen) and buffers."""
        masked = self._method.weights.keys()
        yield from ((name, p) for name, p in self._parameters() if p.requires_grad or name in masked)
        yield from self._trainer.model.named_buffers()

    def copied(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return copies by name; of a tensor that is the same since `undone_on_error` was entered, the copy there."""

        def copy(name: str, tensor: Tensor) -> Tensor:
            known = self._undo.get(name)
            holds = known is not None and known.device == tensor.device and torch.equal(known, tensor)
            return known if known is not None and holds else tensor.detach().clone()

        return {name: copy(name, tensor) for name, tensor in tensors}

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
        bring_back = self._remember_random_state()
        try:
            yield
        finally:
            bring_back()

    def _remember_random_state(self) -> Callable[[], None]:
        """Return a function that restores what `random_state` restores."""
        model, device = self._trainer.model, self._trainer.args.device
        python_state, numpy_state, training = random.getstate(), np.random.get_state(), model.training
        cpu_state = torch.get_rng_state()
        cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

        def bring_back() -> None:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(cpu_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, device)
            model.train(training)

        return bring_back

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
