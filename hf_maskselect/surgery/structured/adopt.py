"""Give a model the shape of a smaller one in place, so that whoever holds the model has the smaller one."""

from typing import Any

from transformers import PreTrainedModel

from .cut import Cutter
from .families import family_of
from .shapes import Shape


def adopt(model: PreTrainedModel, small: PreTrainedModel) -> None:
    """Make `model` the smaller model: it takes over its modules and its configuration.

    What lies on the model itself stays: hooks, and what accelerate has wrapped around its forward pass.
    """
    for name, module in small.named_children():
        model.add_module(name, module)
    config: Any = model.config
    vars(config).clear()
    vars(config).update(vars(small.config))
    config.__class__ = type(small.config)  # which says shapes by layer, or does not
    for module in model.modules():
        if vars(module).get("config") is small.config:
            module.config = config


def reshape(model: PreTrainedModel, shape: Shape) -> None:
    """Give a model a smaller shape in place, with any of its weights: others are loaded afterwards."""
    adopt(model, Cutter(model, family_of(model)).cut(shape))
