"""Heads and neurons layer by layer: what is cut, what it computes, and what the configuration says."""

import copy
import pickle

import pytest
import tiny_tokenizers as tokenizers
import torch
from small_models import BY_LAYER, make_free, make_model, rows_for
from tiny import same, weights_of

from hf_maskselect import trim_vocabulary
from hf_maskselect.surgery.structured.batches import batches_of, rows_of
from hf_maskselect.surgery.structured.cut import Cutter, give_shapes
from hf_maskselect.surgery.structured.families import family_of
from hf_maskselect.surgery.structured.layer_shapes import LayerShapes
from hf_maskselect.surgery.structured.shapes import Encoder, Shape

FIRST = ("Bert", "MPNet")  # the others are slow for what they add
SLOW = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in BY_LAYER]


def outputs(model):
    rows = rows_of(rows_for(model), model)
    with torch.no_grad():
        return [model(**batch)[0] for batch in batches_of(rows, model)]


@pytest.mark.parametrize("family", SLOW)
def test_removed_heads_and_neurons_are_those_that_are_not_read(family):
    """A model computes the same without the heads and neurons that its consumers do not read."""
    model = make_model(family)
    kind = family_of(model)
    generator = torch.Generator().manual_seed(0)
    orders = [(torch.randperm(4, generator=generator), torch.randperm(64, generator=generator)) for _ in range(3)]
    shape = Shape((0, 1, 2), (40, 64, 8), (3, 1, 4))
    for layer, (heads, neurons), width, count in zip(
        kind.layers(model), orders, shape.widths, shape.heads, strict=True
    ):
        attention, ffn = kind.consumers(layer)
        ffn.weight.data[:, neurons[: 64 - width]] = 0
        attention.weight.data.view(32, 4, 8)[:, heads[: 4 - count]] = 0
    small = Cutter(model, kind, orders).cut(shape)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs(small), outputs(model), strict=True))
    again = Cutter(small, kind).cut(Shape((0, 2), (24, 8), (2, 3)))  # a shape by layer can be cut once more
    assert Encoder.of(again, kind).head_counts == (2, 3) and all(torch.isfinite(a).all() for a in outputs(again))


@pytest.mark.parametrize("family", SLOW)
def test_sizes_and_parameters_are_counted_as_they_are(family):
    model, small = make_model(family), make_free(family)
    kind, shape = family_of(model), Shape((0, 2), (40, 24), (3, 1))
    counted = sum(p.numel() for layer in kind.layers(small) for p in layer.parameters())
    assert Encoder.of(model, kind).parameters(shape) == counted
    encoder = Encoder.of(small, kind)
    assert (encoder.widths, encoder.head_counts) == (shape.widths, shape.heads)
    assert encoder.parameters(encoder.full()) == counted
    assert encoder.uniform((0, 1), 32, 2) == Shape((0, 1), (32, 24), (2, 1))


def test_shared_layers_keep_their_heads():
    model = make_model("Albert")
    cutter = Cutter(model, family_of(model))
    small = cutter.cut(cutter.encoder.uniform((0, 1, 2), 40, 4))
    assert LayerShapes.of(small.config) is None and small.config.intermediate_size == 40
    with pytest.raises(ValueError, match="the layers of a 'albert' model share their weights"):
        cutter.cut(cutter.encoder.uniform((0, 1, 2), 40, 3))


def test_position_biases_follow_their_heads():
    model = make_model("MPNet")
    orders = [(torch.tensor([1, 3, 0, 2]), torch.arange(64))] * 3
    small = Cutter(model, family_of(model), orders).cut(Shape((0, 1), (64, 64), (2, 4)))
    assert LayerShapes.of(small.config).biases == ((0, 2), (0, 1, 2, 3))
    orders = [(torch.arange(2), torch.arange(64)), (torch.arange(4), torch.arange(64))]
    again = Cutter(small, family_of(small), orders).cut(Shape((0, 1), (64, 64), (1, 4)))
    assert LayerShapes.of(again.config).biases == ((2,), (0, 1, 2, 3))


def test_the_configuration_is_ordinary_again_when_it_can_say_the_shape():
    small = make_free()
    cutter = Cutter(small, family_of(small))
    uniform = cutter.cut(Shape((0,), (24,), (3,)))
    assert LayerShapes.of(uniform.config) == LayerShapes((3,), (24,))
    small = make_free("ViT")
    plain = Cutter(small, family_of(small)).cut(Shape((0, 1), (16, 16), (1, 1)))
    assert LayerShapes.of(plain.config) is None and "quantization_config" not in plain.config.to_dict()
    assert type(plain.config) is type(make_model("ViT").config)
    assert (plain.config.num_attention_heads, plain.config.intermediate_size) == (1, 16)


def test_copies_and_pickles_say_the_shape():
    small = make_free()
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert again.config.to_dict() == small.config.to_dict()
        assert again.config.to_diff_dict()["quantization_config"] == small.config.to_dict()["quantization_config"]
        assert not hasattr(again.config, "quantization_config") and same(weights_of(again), weights_of(small))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", [3], "there are 2 layers"),
        ("heads", [3, 0], "each layer has 1 to 4 heads"),
        ("heads", [3, 5], "each layer has 1 to 4 heads"),
        ("heads", [3, True], "is no list of whole numbers"),
        ("widths", "40", "is no list of whole numbers"),
        ("widths", [40, 0], "and a neuron"),
        ("widths", [40, 65], "layer 1 has 65 neurons, but config.json says at most 64"),
        ("biases", [[0, 1, 1], [2]], "each head reads one column"),
        ("biases", [[0, 1, 4], [2]], "biases have 4 columns"),
        ("more", 1, "it needs heads, widths and biases"),
    ],
)
def test_damaged_shapes_are_refused(field, value, message):
    config = make_free().config
    config.layer_shapes[field] = value
    model = make_model(num_hidden_layers=2)
    model.config = config
    with pytest.raises(ValueError, match=message):
        give_shapes(model)


def test_the_vocabulary_is_trimmed_too():
    tokenizer = tokenizers.bert()
    small = make_free(vocab_size=len(tokenizer))
    trimmed, _, _ = trim_vocabulary(small, tokenizer, ["some words"])
    assert LayerShapes.of(trimmed.config) == LayerShapes.of(small.config)
    assert trimmed.config.vocab_size < small.config.vocab_size
