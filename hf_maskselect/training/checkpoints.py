"""What a saved model of a pruning run holds: exactly sparse weights, and the run in its configuration."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..fields.resolved import ResolvedConfig
from ..masking.dtensors import gathered, local_rows, swap_data
from ..masking.targets import without_regexes
from ..methods.base import Method
from ..storage.state import PruningState
from ..surgery.structured.record import StructureRecord

FORMAT_VERSION = 1  # of config.pruning


@contextlib.contextmanager
def baked(method: Method) -> Iterator[None]:
    """Inside, the model holds what a user would get: exactly sparse weights, whatever the method trains on."""
    if method.aside:  # it does already
        yield
        return
    sparse = method.baked_state_dict() or {}
    method.aside = {name: swap_data(method.weights[name], local_rows(tensor)) for name, tensor in sparse.items()}
    try:
        yield
    finally:
        for name, tensor in method.aside.items():
            swap_data(method.weights[name], tensor)
        method.aside = {}


def forget_preparation(trainer: Trainer) -> None:
    """Make an evaluation before training leave no trace.

    It marks the raw model as prepared by accelerate, and a later `train()` would run without DDP.
    """
    model: Any = trainer.model
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False
    trainer.model_wrapped = model
    trainer.accelerator.free_memory()


def put_baked(method: Method, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Replace the trained weights in a gathered state by the exactly sparse ones. All ranks call it together."""
    sparse = {name: gathered(tensor) for name, tensor in (method.baked_state_dict() or {}).items()}
    if state_dict is not None:  # only the process that saves has one
        state_dict |= {name: tensor.to(state_dict[name]) for name, tensor in sparse.items() if name in state_dict}


def to_save(model: nn.Module, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """The state to save: in row-major order, as safetensors needs it, where no `save_pretrained` sees to that."""
    if state_dict is not None or isinstance(model, PreTrainedModel):
        return state_dict
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def describe(model: nn.Module, state: PruningState, settings: ResolvedConfig) -> None:
    """Write a summary of the run into `model.config.pruning`, which `save_pretrained` saves."""
    if not isinstance(model, PreTrainedModel):
        return
    summary = {
        "method": state.method,
        "pattern": state.pattern,
        "sparsity": state.sparsity,
        "achieved": state.masks.sparsity(),
        "version": FORMAT_VERSION,
    }
    if settings.structure is not None:
        summary = {"pattern": state.pattern, "version": FORMAT_VERSION}
    modules = {"target_modules": settings.target_modules, "exclude_modules": settings.exclude_modules}
    # A regex is not written: whoever loads the model must not run a pattern from a file.
    summary |= {name: without_regexes(model, value) for name, value in modules.items() if value is not None}
    record = StructureRecord.find(model.config)
    model.config.pruning = summary
    if record is not None:
        record.write(model.config)
