"""Shapes that a configuration of transformers cannot say: heads and neurons layer by layer.

The configuration keeps them in a field of its own, and `to_dict` adds a `quantization_config` to it, which makes
`from_pretrained` call the loader of this package. At run time there is no such entry, so that the model is an ordinary
one for everybody who asks whether it is quantized.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

FIELD = "layer_shapes"  # of the configuration
# Transformers prints it where this package was not imported, before it refuses the weights because of their shapes.
METHOD = "hf_maskselect (import hf_maskselect before this model is loaded)"
TRIGGER = {"quant_method": METHOD}


@dataclass(frozen=True)
class LayerShapes:
    """The shapes of all layers.

    heads, widths: heads and neurons of each layer. biases: for families whose layers share one table of position
    biases, the columns of the table that each layer reads; otherwise empty.
    """

    heads: tuple[int, ...]
    widths: tuple[int, ...]
    biases: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LayerShapes | None":
        """Return the shapes that a configuration has; None for an ordinary one.

        Raises:
            ValueError: the field is damaged.
        """
        fields = vars(config).get(FIELD)
        if fields is None:
            return None
        try:
            if not isinstance(fields, Mapping) or set(fields) != {"heads", "widths", "biases"}:
                raise ValueError("it needs heads, widths and biases")
            shapes = cls(_numbers(fields["heads"]), _numbers(fields["widths"]), tuple(map(_numbers, fields["biases"])))
            shapes._check(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{FIELD} of config.json describes no layers ({error}): restore the file") from error
        return shapes

    def _check(self, config: Any) -> None:
        depth, heads = config.num_hidden_layers, config.num_attention_heads
        if not len(self.heads) == len(self.widths) == depth:
            raise ValueError(f"there are {depth} layers")
        if not all(1 <= count <= heads for count in self.heads) or min(self.widths) < 1:
            raise ValueError(f"each layer has 1 to {heads} heads, and a neuron")
        if self.biases and [len(set(columns)) for columns in self.biases] != list(self.heads):
            raise ValueError("each head reads one column of biases")
        if any(not 0 <= column < heads for columns in self.biases for column in columns):
            raise ValueError(f"biases have {heads} columns")

    def say(self, config: PretrainedConfig) -> None:
        """Write the shapes into a configuration."""
        fields = asdict(self)
        setattr(config, FIELD, {name: [*map(_plain, values)] for name, values in fields.items()})
        if not isinstance(config, _SaysShapes):
            kind: Any = type(config)
            config.__class__ = _saying(kind)

    @staticmethod
    def forget(config: Any) -> None:
        """Make a configuration an ordinary one again."""
        if isinstance(config, _SaysShapes):
            config.__class__ = type(config).__bases__[1]
            delattr(config, FIELD)


def for_loading(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a configuration with which `from_pretrained` gives each layer its shape."""
    config = copy.deepcopy(config)
    if LayerShapes.of(config) is not None:
        config.quantization_config = dict(TRIGGER)
    return config


class _SaysShapes:
    """Adds the entry that calls the loader to what a configuration writes.

    A class of configurations, since copies, pickles and `save_pretrained` of models and configurations keep it.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dictionary."""
        return _triggered(super().to_dict())  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields that are not defaults as a dictionary."""
        return _triggered(super().to_diff_dict())  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (type(self).__bases__[1], vars(self))


@functools.cache
def _saying(cls: Any) -> Any:
    # Auto classes find configurations by the name of their class.
    return type(cls.__name__, (_SaysShapes, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _rebuilt(cls: Any, fields: dict[str, Any]) -> PretrainedConfig:
    saying = _saying(cls)
    config: PretrainedConfig = saying.__new__(saying)
    vars(config).update(fields)
    return config


def _triggered(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "quantization_config": dict(TRIGGER)} if FIELD in fields else fields


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or any(type(value) is not int for value in values):
        raise ValueError(f"{values!r:.60} is no list of whole numbers")
    return tuple(values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class MPNetFewerHeads(MPNetSelfAttention):
    """Attention of an MPNet layer that reads some columns of the table of position biases, which all layers share."""

    bias_columns: list[int]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute attention with the biases of the heads that this layer has."""
        if position_bias is not None:
            position_bias = position_bias[:, self.bias_columns]
        return super().forward(hidden_states, attention_mask, position_bias, *args, **kwargs)


def bias_columns(attention: nn.Module, heads: int) -> list[int]:
    """Return the columns of the shared table of biases that an attention reads; `heads` columns by default."""
    return attention.bias_columns if isinstance(attention, MPNetFewerHeads) else list(range(heads))


def read_columns(attention: Any, columns: list[int]) -> None:
    """Make an attention read some columns of the shared table of biases."""
    attention.__class__ = MPNetFewerHeads
    attention.bias_columns = columns
