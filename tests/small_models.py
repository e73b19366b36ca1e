"""Tiny models of every family that can be made smaller, and rows for them."""

import torch
from tiny import COMMON, FAMILIES, make, make_rows
from transformers import (
    MPNetConfig,
    MPNetForSequenceClassification,
    NomicBertConfig,
    NomicBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from hf_maskselect.surgery.structured.cut import Cutter
from hf_maskselect.surgery.structured.families import family_of
from hf_maskselect.surgery.structured.shapes import Shape

SIZES = {**COMMON, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
OTHERS = {
    "MPNet": (MPNetForSequenceClassification, MPNetConfig),
    "NomicBert": (NomicBertForSequenceClassification, NomicBertConfig),
    "ViT": (ViTForImageClassification, ViTConfig),
    "XLMRoberta": (XLMRobertaForSequenceClassification, XLMRobertaConfig),
}
EVERY = [*FAMILIES, *OTHERS]


def make_model(family="Bert", seed=0, **changes):
    """A random model of three layers, of width 64 and 4 heads, with biases that are not zero."""
    if family in OTHERS:
        torch.manual_seed(seed)
        cls, config = OTHERS[family]
        image = {"image_size": 8, "patch_size": 4} if family == "ViT" else {}
        model = cls(config(**{**SIZES, **image, **changes}))
    else:
        sizes = (
            {"n_layers": 3, "n_heads": 4}
            if family == "DistilBert"
            else {"num_hidden_layers": 3, "num_attention_heads": 4}
        )
        model = make(family, seed=seed, **{**sizes, **changes})
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


BY_LAYER = [family for family in EVERY if family != "Albert"]  # whose layers share their weights


def make_free(family="Bert", **changes):
    """A random model of two layers with other widths and heads each, cut from `make_model`."""
    model = make_model(family, **changes)
    return Cutter(model, family_of(model)).cut(Shape((0, 2), (40, 24), (3, 1)))


def rows_for(model, count=48, seed=0):
    """Rows of different lengths, or images."""
    if model.main_input_name == "pixel_values":
        generator = torch.Generator().manual_seed(seed)
        return [{"pixel_values": torch.randn(3, 8, 8, generator=generator)} for _ in range(count)]
    lengths = [4 + number % 7 for number in range(count)]
    return [
        {"input_ids": row["input_ids"][:length], "labels": row["labels"]}
        for row, length in zip(make_rows(count, 10, seed), lengths, strict=True)
    ]
