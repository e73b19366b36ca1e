"""PDP that begins from the scores of a criterion: its ranking, its training, its checkpoints and its refusals."""

import copy

import pytest
import torch
from plain_pdp import plain_training
from tiny import losses, make, make_rows, make_trainer, same, weights_of

from hf_maskselect import MaskSet, prunable_weights, verify
from hf_maskselect.masking.patterns import parse_pattern
from hf_maskselect.masking.scores import CRITERIA
from hf_maskselect.methods.factors import factors
from hf_maskselect.storage.state import load_method_state

PDP = {"method": "pdp", "num_levels": None, "pruning_warmup_steps": 2, "frozen_steps": 0, "soft_ramp": 0.8}


def scores(seed=0, degree=1.0):
    """A matrix with a zero, and the scores that its magnitudes and some gradients give."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(24, 16, generator=generator)
    weight[3, 5] = 0
    gradients = torch.rand(24, 16, generator=generator).exp2() * 1e3
    return weight, (weight.abs() * gradients) ** degree


@pytest.mark.parametrize("degree", [1.0, 2.0])
@pytest.mark.parametrize("name", ["unstructured", "2:4", "1x4", "2x2", "channel"])
def test_products_rank_like_the_scores_of_units(name, degree):
    """Their sizes are, in float64, the root of the scores times one number of the matrix."""
    weight, score = scores(degree=degree)
    pattern = parse_pattern(name)
    units = pattern.unit_scores(score)
    factor = factors(score, units, weight, pattern, degree)
    assert factor.dtype == torch.float16 and factor.shape == weight.shape
    products = (weight.double() * factor.double()).abs()
    view = pattern.view(products)
    axes = pattern.unit_axes(view.dim())
    sizes = view.square().mean(axes).sqrt().flatten() if axes else products
    ratio = sizes / units.double() ** (1 / degree)
    ratio = ratio[units > 0]
    assert float(ratio.max() / ratio.min()) == pytest.approx(1, abs=2e-3)  # half precision


def test_zeros_and_dead_weights_keep_a_finite_factor():
    weight, score = scores()
    score[4] = 0  # a row without gradients
    factor = factors(score, score, weight, parse_pattern("unstructured"), 1.0)
    assert float(factor[3, 5]) == 1 and float(factor.min()) == 2.0**-14 and bool(factor.isfinite().all())
    assert float(factor.float().mean()) == pytest.approx(1, rel=1e-3)
    assert bool((factors(0 * score, 0 * score, weight, parse_pattern("unstructured"), 1.0) == 1).all())


def test_training_equals_that_of_the_products_written_with_autograd(tmp_path):
    model, rows = make().double(), make_rows(96)
    start = copy.deepcopy(model)
    trainer = make_trainer(
        tmp_path,
        model,
        rows,
        **PDP,
        pdp_relative_tau=0.5,
        scope="layer",
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )
    trainer.train()
    method = trainer.run.method
    made = {name: factor.double() for name, factor in method._factors.items()}

    def soft_mask(squares, t):
        return torch.sigmoid((squares / t**2 - 1) / 0.5)

    expected = plain_training(start, rows, 12, made, method._zeros, soft_mask, warmup=2, ramp=8, rate=0.1)
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert not all(bool((factor == 1).all()) for factor in made.values())


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
@pytest.mark.parametrize("scope", ["layer", "balanced", "global"])
def test_the_soft_phase_begins_with_the_masks_of_the_criterion(tmp_path, criterion, scope):
    found = []
    trainer = make_trainer(tmp_path, **PDP, criterion=criterion, scope=scope)
    method, bench = trainer.run.method, trainer.run.bench
    begin = method.take_scores

    def watched(score_of, degree):
        digests = begin(score_of, degree)
        stats = bench.gradient_stats(set(CRITERIA[criterion].needs), 0)
        of_all = {n: CRITERIA[criterion].score(n, w.detach(), stats.of(n)) for n, w in method.weights.items()}
        found.append((MaskSet(parse_pattern("unstructured", scope).masks(of_all, 0.75)), method.candidate(None, 0)))
        return digests

    method.take_scores = watched
    trainer.train()
    ((expected, begun),) = found
    assert expected.overlap(begun) > 0.998  # ties of half precision
    assert all(int(mask.sum()) == int(begun[name].sum()) for name, mask in expected.items())
    assert {n: m.numel() - int(m.sum()) for n, m in trainer.pruning_state().masks.items()} == method._zeros


@pytest.mark.parametrize("pattern", ["1:4", "1x4", "channel"])
def test_every_pattern_ends_exact_and_plain(tmp_path, pattern):
    trainer = make_trainer(tmp_path, **{**PDP, "sparsity": None if ":" in pattern else 0.75}, pattern=pattern)
    trainer.train()
    trainer.save_model()
    masks = verify(tmp_path).masks
    assert masks.sparsity() == 0.75 and all(parse_pattern(pattern).holds(m, 0.75) for m in masks.values())


def test_scores_of_the_user_decide_and_samples_are_those_of_the_first_soft_step(tmp_path):
    name = "bert.encoder.layer.0.output.dense.weight"
    seen = []

    def score_fn(weight_name, weight, stats):
        seen.append((trainer.state.global_step, stats.samples))
        return torch.full_like(weight, 100.0 if weight_name == name else 1.0) * weight.abs()

    trainer = make_trainer(tmp_path, **PDP, keywords={"score_fn": score_fn}, scope="global")
    trainer.train()
    assert seen == [(2, 4)] * len(prunable_weights(trainer.model))
    masks = trainer.pruning_state().masks
    assert masks[name].float().mean() > 0.9 > 0.25 > masks["bert.encoder.layer.1.output.dense.weight"].float().mean()


def test_zeros_of_the_start_stay_and_count_as_nothing(tmp_path):
    model = make()
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    trainer = make_trainer(tmp_path, model, **PDP)
    trainer.train()
    assert not bool(weight[:, ::2].any()) and trainer.pruning_state().masks.sparsity() == 0.75


def test_a_second_run_samples_anew_and_the_papers_setting_samples_nothing(tmp_path):
    trainer = make_trainer(tmp_path, **PDP)
    trainer.train()
    first = weights_of(trainer.model)
    begun = trainer.run.method._factors
    trainer.train()
    assert trainer.run.method._factors.keys() == begun.keys() and not same(trainer.run.method._factors, begun)
    assert not same(first, weights_of(trainer.model))
    paper = make_trainer(tmp_path / "paper", **PDP, pdp_tau=1e-4)
    paper.run.bench.gradient_stats = lambda *_: pytest.fail("magnitudes need no gradients")
    paper.train()
    assert paper.run.settings.criterion == "magnitude" and paper.run.settings.pdp_taus[0] == 1e-4
    assert not paper.run.method._factors


def test_a_checkpoint_has_the_factors_and_another_criterion_is_refused_by_name(tmp_path):
    trainer = make_trainer(tmp_path, **PDP, save_strategy="steps", save_steps=5)
    trainer.train()
    folder = tmp_path / "checkpoint-5"
    state = load_method_state(folder)
    assert all(state[f"factors.{name}"].dtype == torch.float16 for name in trainer.run.method.weights)
    for changes, now in (({"criterion": "fisher"}, "'fisher'"), ({"pdp_tau": 1e-3}, "'magnitude'")):
        other = make_trainer(tmp_path / "other", **PDP, **changes)
        with pytest.raises(ValueError, match=f"criterion='taylor' but this run has criterion={now}"):
            other.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("changes", "score_fn", "message"),
    [
        ({}, lambda name, weight, stats: weight - 1, r"scores >= 0, but those of .*query\.weight are negative"),
        ({}, lambda name, weight, stats: 0 * weight, "all scores are zero"),
        ({}, lambda name, weight, stats: weight / 0, r"NaN or infinity in the scores of .*query\.weight"),
        (
            {"pdp_tau": 1e-3},
            lambda name, weight, stats: weight.abs(),
            "score_fn has no meaning with method='pdp' that",
        ),
    ],
)
def test_scores_that_rank_nothing_are_refused(tmp_path, changes, score_fn, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **PDP, **changes, keywords={"score_fn": score_fn}).train()
