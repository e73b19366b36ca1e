"""The model inside what `torch.compile` or a parallel container has put around it."""

import contextlib
import copy
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def plain_model(model: Any) -> Any:
    """Return the model with the names of its own modules, also where only a module inside it is compiled.

    A wrapper from `torch.compile` leaves its module, which stays compiled in place, as by `module.compile()`. So the
    model computes the same as before, at the same speed. `DataParallel` and `DistributedDataParallel` are taken off.
    Anything else, a path too, is returned as it is.
    """
    while isinstance(model, DataParallel | DistributedDataParallel) or _is_compiled(model):
        model = model.module if isinstance(model, DataParallel | DistributedDataParallel) else _in_place(model)
    for parent in list(model.modules()) if isinstance(model, nn.Module) else ():
        for name, child in list(parent.named_children()):
            if _is_compiled(child):
                setattr(parent, name, plain_model(child))
    return model


def own_copy(model: nn.Module) -> Any:
    """Return a deep copy that runs its own forward pass, in its own dtype.

    Under mixed precision accelerate wraps the forward pass of a model. The wrapper belongs to the object: in a copy it
    would still call the first model.
    """
    copied = copy.deepcopy(model)
    for name in ("forward", "_original_forward"):
        vars(copied).pop(name, None)
    return copied


def eager() -> AbstractContextManager:
    """Inside, compiled code runs as plain Python, in which forwards may be replaced and hooks may run."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _is_compiled(module: Any) -> bool:
    dynamo: Any = sys.modules.get("torch._dynamo")  # its import takes long; without it nothing is compiled
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _in_place(compiled: Any) -> nn.Module:
    module = compiled._orig_mod
    if module._compiled_call_impl is None:
        module._compiled_call_impl = compiled.dynamo_ctx(module._call_impl)
    return module
