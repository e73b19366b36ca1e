"""Heads and neurons that move between layers: the budget is met, and what helps is found."""

import pytest
import torch
from small_models import BY_LAYER, make_free, make_model, rows_for

from hf_maskselect import shrink_model
from hf_maskselect.surgery.structured.budget import Budget
from hf_maskselect.surgery.structured.families import family_of
from hf_maskselect.surgery.structured.layer_shapes import LayerShapes
from hf_maskselect.surgery.structured.search import Candidate
from hf_maskselect.surgery.structured.shapes import Encoder
from hf_maskselect.surgery.structured.switches import SwitchSearch

ENCODER = Encoder((640, 640, 640, 320), (8, 8, 8, 4), 8, (0,) * 4, 1, 40, False)
BUDGET = Budget(ENCODER, ENCODER.parameters, 1600)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("hf_maskselect.surgery.structured.latency._SECONDS", 0.0)


def missed(shape):
    """The first layer needs neurons, the second one heads."""
    return (640 - shape.widths[0]) + 40 * (8 - shape.heads[1]) + sum(shape.widths[2:]) / 100


def switched(count, seed=0):
    start = ENCODER.uniform((0, 1, 2, 3), 280, 3)
    return start, SwitchSearch(BUDGET, missed, count, seed).run(Candidate(start, missed(start)))


def test_shapes_keep_the_budget_and_their_bounds():
    start, tried = switched(60)
    shapes = [each.shape for each in tried]
    assert len(set(shapes)) == 60 and start not in shapes
    for shape in shapes:
        assert BUDGET.limit - 8 < ENCODER.parameters(shape) <= BUDGET.limit
        assert all(width % 8 == 0 and 8 <= width for width in shape.widths) and min(shape.heads) >= 1
        assert all(w <= most for w, most in zip(shape.widths, ENCODER.widths, strict=True))
        assert all(h <= most for h, most in zip(shape.heads, ENCODER.head_counts, strict=True))


def test_what_helps_is_found():
    start, tried = switched(100)
    best = min(tried, key=lambda each: each.divergence)
    assert best.divergence < 0.6 * missed(start)
    assert tried == switched(100)[1]


def test_widths_are_scaled_together():
    shape = ENCODER.uniform((0, 1, 2, 3), 280, 3)
    assert BUDGET.scaled(shape) == ENCODER.uniform((0, 1, 2, 3), 280, 3)
    narrow = Budget(ENCODER, ENCODER.parameters, 900).scaled(shape)
    assert ENCODER.parameters(narrow) <= 900 and len(set(narrow.widths)) == 1 and narrow.heads == shape.heads
    assert Budget(ENCODER, ENCODER.parameters, 500).scaled(shape) is None


@pytest.mark.parametrize(
    "family", [name if name == "Bert" else pytest.param(name, marks=pytest.mark.slow) for name in BY_LAYER]
)
def test_free_shapes_of_every_family(family):
    model = make_model(family)
    small, report = shrink_model(
        model, rows_for(model), sparsity=0.6, keep_shape="free", num_candidates=4, latency_shape=(1, 4)
    )
    assert report.layers_removed >= 0.6 and 4 < len(report.candidates) <= 8
    assert len({each.shape.heads for each in report.candidates}) > 2 and str(report.shape) in str(report)
    found = Encoder.of(small, family_of(small))
    assert (found.widths, found.head_counts) == (report.shape.widths, report.shape.heads)


def test_smaller_once_more():
    small = make_free()
    again, report = shrink_model(
        small, rows_for(small), sparsity=0.3, keep_shape="free", num_candidates=2, latency_shape=(1, 4)
    )
    assert again.num_parameters() < small.num_parameters() and report.dense.widths == (40, 24)
    with pytest.raises(ValueError, match="have shapes of their own already: use keep_shape='free'"):
        shrink_model(small, rows_for(small), sparsity=0.3, latency_shape=(1, 4))


def test_what_has_no_free_shape_is_refused():
    model = make_model("Albert")
    with pytest.raises(ValueError, match="the layers of a 'albert' model share their weights"):
        shrink_model(model, rows_for(model), sparsity=0.3, keep_shape="free", latency_shape=(1, 4))
    with pytest.raises(ValueError, match="keep_shape='any' must be 'uniform' or 'free'"):
        shrink_model(model, rows_for(model), sparsity=0.3, keep_shape="any", latency_shape=(1, 4))
    with pytest.raises(ValueError, match="ask for less, or for keep_shape='free'"):
        shrink_model(make_model(), rows_for(model), sparsity=0.97, latency_shape=(1, 4))


def test_a_speedup_with_free_shapes():
    model = make_model()
    small, report = shrink_model(
        model, rows_for(model), speedup=1.01, keep_shape="free", num_candidates=3, latency_shape=(1, 4)
    )
    assert report.speedup > 0 and (LayerShapes.of(small.config) is None) == (
        len(set(report.shape.widths)) == 1 and set(report.shape.heads) == {4}
    )
    with torch.no_grad():
        assert torch.isfinite(small(**{"input_ids": torch.tensor([[3, 4]])})[0]).all()
