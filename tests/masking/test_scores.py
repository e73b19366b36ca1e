"""Criteria and gradient statistics, against float64 autograd."""

import copy

import pytest
import torch
from tiny import make, make_rows
from torch.testing import assert_close

from hf_maskselect import prunable_weights
from hf_maskselect.masking.scores import CRITERIA, GradientStats, StoredStats, WeightStats, checked_score

NEEDS = {"square", "product", "sensitivity", "uncertainty"}


def batches(sizes=(1, 3, 2, 1)):
    rows = iter(make_rows(sum(sizes)))
    for size in sizes:
        chosen = [next(rows) for _ in range(size)]
        yield {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}


def collect(model, weights, needs=NEEDS):
    with GradientStats(model, weights, needs) as stats:
        for batch in batches():
            stats.sample(model(**batch).loss)
    return stats


@pytest.mark.parametrize("family", ["Bert", "Albert", "DebertaV2"])
def test_statistics_are_those_of_float64_autograd(family):
    """Albert's one layer runs twice: its gradient must be summed over both uses before it is squared."""
    model = make(family, num_labels=2)
    exact = copy.deepcopy(model).double()
    weights, exact_weights = prunable_weights(model), prunable_weights(exact)
    expected = {kind: {name: torch.zeros_like(w) for name, w in exact_weights.items()} for kind in NEEDS}
    for batch in batches():
        grads = torch.autograd.grad(exact(**batch).loss, list(exact_weights.values()))
        for (name, weight), grad in zip(exact_weights.items(), grads, strict=True):
            of, product = {kind: expected[kind][name] for kind in NEEDS}, (grad * weight.detach()).abs()
            of["square"] += grad**2
            of["product"] += product
            of["sensitivity"].copy_(0.85 * of["sensitivity"] + 0.15 * product)
            of["uncertainty"].copy_(0.95 * of["uncertainty"] + 0.05 * (product - of["sensitivity"]).abs())
    stats = collect(model, weights)
    for name, weight in weights.items():
        found = stats.of(name)
        assert found.samples == 4 and found.square.shape == weight.shape
        for kind in NEEDS:
            ours, theirs = getattr(found, kind), expected[kind][name]
            assert theirs.max() > 0
            assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * float(theirs.max()))


def test_statistics_of_a_file_are_those_that_were_collected(tmp_path):
    model = make()
    weights = prunable_weights(model)
    for needs in NEEDS, {"sensitivity", "uncertainty"}:
        stats = collect(model, weights, needs)
        stats.save(tmp_path / "statistics.safetensors")
        stored = StoredStats(tmp_path / "statistics.safetensors", torch.device("cpu"))
        for name in weights:
            first, second = stats.of(name), stored.of(name)
            assert first.samples == second.samples == 4
            for kind in NEEDS:
                one, other = getattr(first, kind), getattr(second, kind)
                assert (one is None) == (other is None) == (kind not in needs)
                assert one is None or torch.equal(one, other)


def test_only_what_is_needed_is_collected():
    model = make()
    weights = prunable_weights(model)
    for needs in ({"square"}, {"product"}, {"sensitivity", "uncertainty"}):
        for name in weights:
            stats = collect(model, weights, needs).of(name)
            assert {field for field in NEEDS if getattr(stats, field) is not None} == needs


@pytest.mark.parametrize("fails", [False, True])
def test_collecting_leaves_the_model_as_it_was(fails):
    model = make()
    weights = prunable_weights(model)
    model.bert.embeddings.requires_grad_(False)
    values = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with GradientStats(model, weights, NEEDS) as stats:
            assert {name for name, p in model.named_parameters() if p.requires_grad} == set(weights)
            stats.sample(model(**next(batches())).loss)
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    before = {name: stats.of(name).square.clone() for name in weights}
    model(**next(batches())).loss.backward()  # an ordinary step afterwards: gradients stay, statistics rest
    assert all((p.grad is not None) == flags[name] for name, p in model.named_parameters() if "pooler" not in name)
    assert all(torch.equal(stats.of(name).square, before[name]) for name in weights)


def test_gradients_accumulated_before_do_not_enter():
    model = make()
    weights = prunable_weights(model)
    clean = collect(model, weights)
    for weight in weights.values():
        weight.grad = torch.full_like(weight, 100.0)
    dirty = collect(model, weights)
    for name in weights:
        assert_close(dirty.of(name).square, clean.of(name).square)


def test_criteria_are_their_formulas():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=g)
    square, product, average, spread, inverse = torch.rand(5, 3, 5, generator=g)
    stats = WeightStats(square, product, 4, average, spread, inverse)
    expected = {"magnitude": weight.abs(), "fisher": weight**2 * square, "taylor": product}
    expected |= {"platon": average * spread, "obert": weight**2 / (2 * inverse)}
    assert CRITERIA.keys() == expected.keys()
    for name, criterion in CRITERIA.items():
        assert_close(checked_score(criterion.score, "w", weight, stats), expected[name])
        needed = {field: getattr(stats, field) if field in criterion.needs else None for field in (*NEEDS, "inverse")}
        assert_close(checked_score(criterion.score, "w", weight, WeightStats(**needed, samples=4)), expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_scores_of_any_dtype_become_float32_without_a_graph(dtype):
    weight = torch.nn.Parameter(torch.randn(4, 6))
    score = checked_score(lambda name, w, stats: (w.abs() * 3).to(dtype), "w", weight, WeightStats(None, None, 0))
    assert score.dtype == torch.float32 and not score.requires_grad
    assert torch.equal(score, (weight.detach().abs() * 3).to(dtype).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_cannot_be_ranked_are_refused_by_name(value):
    def score(name, weight, stats):
        scores = weight.abs()
        scores[1, 2] = value
        return scores

    with pytest.raises(ValueError, match="NaN or infinity.*encoder.query.weight"):
        checked_score(score, "encoder.query.weight", torch.randn(4, 6), WeightStats(None, None, 0))


@pytest.mark.parametrize("wrong", [torch.zeros(6, 4), torch.zeros(24), torch.zeros(1, 6), 1.0, None])
def test_scores_of_another_shape_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"encoder.query.weight.*\(4, 6\).*score_fn"):
        checked_score(lambda *_: wrong, "encoder.query.weight", torch.randn(4, 6), WeightStats(None, None, 0))
