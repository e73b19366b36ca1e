"""Smaller models: every family reloads plainly, targets are met, and bad input is refused."""

import re

import pytest
import torch
from small_models import EVERY, make_model, rows_for
from tiny import same, weights_of
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_maskselect import shrink_model
from hf_maskselect.surgery.structured.batches import batches_of, rows_of
from hf_maskselect.surgery.structured.families import family_of
from hf_maskselect.surgery.structured.latency import Latency
from hf_maskselect.surgery.structured.shapes import Encoder, Shape
from hf_maskselect.surgery.structured.switches import SwitchSearch
from hf_maskselect.surgery.structured.target import narrowed


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("hf_maskselect.surgery.structured.latency._SECONDS", 0.0)


def shrink(model, rows=None, **options):
    given = {"sparsity": 0.4, "num_candidates": 2, "latency_shape": (1, 4)} | options
    return shrink_model(model, rows_for(model) if rows is None else rows, **given)


def outputs(model, rows):
    with torch.no_grad():
        return [model(**batch)[0] for batch in batches_of(rows_of(rows, model), model)]


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("Bert", "ModernBert", "Albert") else pytest.param(name, marks=pytest.mark.slow)
        for name in EVERY
    ],
)
def test_every_family_reloads_with_equal_outputs(family, tmp_path):
    model = make_model(family)
    before, sizes = weights_of(model), model.config.to_dict()
    small, report = shrink(model)
    assert same(weights_of(model), before) and model.config.to_dict() == sizes
    assert report.layers_removed >= 0.4 and report.shape == report.candidates[0].shape
    assert report.parameters == (model.num_parameters(), small.num_parameters())
    assert getattr(small.config, family_of(model).width) == report.shape.width
    assert small.config.num_hidden_layers == len(report.shape.layers)
    assert all(parameter.requires_grad for parameter in small.parameters())
    small.save_pretrained(tmp_path)
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = rows_for(model, seed=1)
    assert all(map(torch.equal, outputs(again, rows), outputs(small, rows)))


def test_the_report_says_what_was_tried_and_reached():
    _, report = shrink(make_model(), num_candidates=5)
    text = str(report)
    divergences = [candidate.divergence for candidate in report.candidates]
    assert divergences == sorted(divergences) and len(divergences) == 5
    assert str(report.shape) in text and f"{report.parameters[1]:,}" in text and "1 x 4, float32, 1 thread" in text


def test_the_same_seed_and_rows_make_the_same_model():
    model = make_model()
    first, second = (shrink(model)[0] for _ in range(2))
    assert same(weights_of(first), weights_of(second))


def test_a_layer_that_does_nothing_goes_without_loss():
    model = make_model("ViT")
    for linear in (model.vit.layers[1].attention.o_proj, model.vit.layers[1].mlp.fc2):
        linear.weight.data = 1e-6 * torch.randn_like(linear.weight)
        linear.bias.data.zero_()
    _, report = shrink(model, sparsity=1 / 3)
    assert report.shape == Shape((0, 2), (64, 64), (4, 4)) and report.divergence < 1e-6


def test_neurons_that_do_nothing_go_without_loss():
    model = make_model("Roberta")
    rows = rows_for(model)
    for layer in model.base_model.encoder.layer:
        layer.output.dense.weight.data[:, ::2] *= 1e-6
    _, report = shrink(model, rows, sparsity=0.01, num_candidates=8)
    assert report.shape.width < 64 and report.divergence < 1e-4


def test_dtype_and_mode_are_those_of_the_model():
    model = make_model().bfloat16().train()
    small, _ = shrink(model)
    assert small.dtype == torch.bfloat16 and small.training


def test_a_regression_and_a_model_without_a_head_are_scored_by_squared_error():
    regression = make_model("Bert", num_labels=1)
    for model in (regression, regression.base_model):
        assert 0 < shrink(model, sparsity=0.2)[1].divergence < 1


def test_twice_smaller_in_two_steps():
    model = make_model(num_hidden_layers=4)
    once, _ = shrink(model, sparsity=0.3)
    twice, report = shrink(once, sparsity=0.3)
    assert twice.num_parameters() < once.num_parameters() and report.dense.width == once.config.intermediate_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": None}, "pass speedup, such as 2.0, or sparsity, such as 0.5, and not both"),
        ({"speedup": 2.0}, "pass speedup, such as 2.0, or sparsity, such as 0.5, and not both"),
        ({"sparsity": 1.0}, "sparsity=1.0 must be between 0 and 1"),
        ({"sparsity": None, "speedup": 1.0}, "speedup=1.0 must be a number above 1"),
        ({"sparsity": None, "speedup": 1e6}, "speedup=1000000.0 is reached by no shape: the smallest, 1 layer "),
        ({"sparsity": 0.99}, "is without 80.9% of the layers' parameters; ask for less"),
        ({"num_candidates": 0}, "num_candidates=0 must be at least 1"),
        ({"rows": []}, "0 rows are too few to fit a model"),
        ({"rows": [{"labels": 1}] * 9}, "a row is dict without input_ids"),
        ({"rows": [{"input_ids": [3, 64]}] * 9}, "a row holds the token id 64, but the model has 64 tokens"),
        ({"rows": [{"input_ids": [3] * 65}] * 9}, "a row has 65 tokens, but the model takes 1 to 64"),
        ({"rows": [{"input_ids": []}] * 9}, "a row has 0 tokens"),
        ({"latency_shape": (8, 128)}, "length 128, but the model has 64 positions"),
        ({"latency_shape": (0, 8)}, "must be a batch size and a length above 0"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        shrink(make_model(), **options)


def test_models_that_cannot_be_made_smaller_are_refused():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    with pytest.raises(ValueError, match="the layers of a 'gpt2' model are not known.*use one of bert, roberta"):
        shrink(GPT2ForSequenceClassification(GPT2Config(**sizes)), [])
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        shrink(torch.nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="has a convolution between its layers"):
        shrink(make_model("DebertaV2", conv_kernel_size=3), [])
    peft = pytest.importorskip("peft")
    adapted = make_model()
    adapted.add_adapter(peft.LoraConfig(target_modules=["intermediate.dense"]))
    with pytest.raises(ValueError, match="intermediate.dense of a layer is no plain linear layer"):
        shrink(adapted, [])


def test_zeros_of_a_mask_are_not_filled():
    model = make_model()
    model.bert.encoder.layer[0].output.dense.weight.data[:, ::2] = 0
    with pytest.raises(ValueError, match=re.escape("of the weights to fit are zero, and the fit would fill them")):
        shrink(model)


class Clock:
    """A machine on which a layer takes as long as its width, and the table says a fifth too little."""

    encoder = Encoder((1024,), (4,), 8, (0,), 1, 0, False)

    def predicted(self, shape):
        return 0.8 * shape.width

    def speedup(self, shape):
        return 1000 / shape.width

    def width_of_time(self, seconds, layers, heads):
        return int(seconds / 0.8 // 8 * 8)


def test_the_width_follows_the_measured_time():
    shape = narrowed(Clock(), Clock.encoder.uniform((0,), 624, 4), 2.0)
    assert 1000 / 2.0 / 1.05 <= shape.width <= 500


def test_the_search_for_free_shapes_starts_from_a_uniform_one_that_was_timed(monkeypatch):
    begun = []

    class Switches(SwitchSearch):
        def __init__(self, budget, *others):
            super().__init__(budget, *others)
            begun.append(budget)

        def run(self, start):
            begun.append(start.shape)
            return super().run(start)

    def predicted(_, shape):
        return 64 + 2 * sum(shape.widths) + 8 * sum(shape.heads)

    def measured(self, shape):  # a fifth slower than by the table
        return 0.8 * self.dense / predicted(self, shape)

    def table(self):
        self.dense = predicted(self, self.encoder.full())

    for name, method in (("_time_table", table), ("predicted", predicted), ("speedup", measured)):
        monkeypatch.setattr(Latency, name, method)
    monkeypatch.setattr("hf_maskselect.surgery.structured.target.SwitchSearch", Switches)
    model = make_model()
    _, report = shrink(model, sparsity=None, speedup=1.3, keep_shape="free", num_candidates=6)
    budget, start = begun
    dense = predicted(None, budget.encoder.full())
    assert len(set(start.widths)) == len(set(start.heads)) == 1
    assert budget.limit == predicted(None, start) <= 0.8 * dense / 1.3
    assert predicted(None, report.shape) <= 0.8 * dense / 1.3
    assert start in [candidate.shape for candidate in report.candidates]
