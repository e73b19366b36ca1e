"""Load models whose configuration says the shape of each layer, which plain transformers cannot.

Transformers has one place where others may change a model between its construction and the loading of its weights: the
loader of quantized models. This package registers one for the entry that such configurations have. After loading, the
model and its configuration are ordinary: nothing says that they are quantized, since they are not.
"""

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..surgery.structured.cut import give_shapes
from ..surgery.structured.layer_shapes import METHOD, LayerShapes


def register_loader() -> None:
    """Make `from_pretrained` load models with shapes by layer."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LayerShapesEntry)
        register_quantizer(METHOD)(LayerShapesLoader)


class LayerShapesEntry(QuantizationConfigMixin):
    """The entry `quantization_config` of config.json; the shapes themselves are in another field."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method: Any = METHOD


class LayerShapesLoader(HfQuantizer):
    """Gives each layer its shape before the weights are loaded."""

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """Cut the layers of a model without weights to their shapes."""
        give_shapes(model)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leave an ordinary model, whose configuration writes the entry again when it is saved."""
        config: Any = model.config
        shapes = LayerShapes.of(config)
        self.remove_quantization_config(model)
        del model.is_quantized
        if shapes is not None:
            shapes.say(config)

    def is_serializable(self) -> bool:
        """Return that such a model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Such a model can be trained."""
        return True
