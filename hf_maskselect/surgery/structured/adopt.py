"""Give a model the shape of a smaller one in place, so that whoever holds the model has the smaller one."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel

from .cut import Cutter, read_biases
from .families import family_of
from .layer_shapes import LayerShapes
from .shapes import Shape


def adopt(model: PreTrainedModel, small: PreTrainedModel) -> None:
    """Make `model` the smaller model: it takes over its modules and its configuration, which is a new object.

    What lies on the model itself stays: hooks, and what accelerate has wrapped around its forward pass. Its embeddings
    stay too, since they have no other shape, and hooks may lie on them.
    """
    embeddings = model.get_input_embeddings()
    for name, module in small.named_children():
        model.add_module(name, module)
    model.config = small.config
    model.set_input_embeddings(embeddings)
    model.tie_weights()


def reshape(model: PreTrainedModel, shape: Shape, layer_shapes: LayerShapes | None) -> None:
    """Give a model a smaller shape in place, with any of its weights: others are loaded afterwards.

    layer_shapes: those of the configuration of the model whose weights are loaded.
    """
    small = Cutter(model, family_of(model)).cut(shape)
    if layer_shapes is not None:
        read_biases(small, layer_shapes)
    adopt(model, small)


@contextlib.contextmanager
def undone_on_error(model: PreTrainedModel) -> Iterator[None]:
    """Give the model its present modules and configuration back if an error leaves the block."""
    modules, config = dict(model.named_children()), model.config
    try:
        yield
    except BaseException:
        for name, module in modules.items():
            model.add_module(name, module)
        model.config = config
        raise
