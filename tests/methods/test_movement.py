"""Movement pruning: training equals an independent implementation, every pattern ends exact, the rest is refused."""

import copy

import pytest
import torch
from tiny import losses, make, make_config, make_rows, make_trainer

from hf_maskselect import MaskSet, prunable_weights
from hf_maskselect.masking.patterns import parse_pattern

MOVEMENT = {"method": "movement", "num_levels": None, "frozen_steps": 0}


def plain_training(model, rows, steps, rate, score_rate, sparsity, ramp_steps):
    """The paper by autograd and plain SGD, from scores of 0: the best of one ranking, straight-through. Returns the
    losses, the scores and the last masks."""
    weights = prunable_weights(model)
    scores = {name: torch.zeros_like(w).requires_grad_() for name, w in weights.items()}
    rest = [p for p in model.parameters() if all(p is not w for w in weights.values())]
    total, found = sum(w.numel() for w in weights.values()), []

    def best(share):
        order = torch.cat([s.detach().flatten() for s in scores.values()]).argsort(descending=True, stable=True)
        kept = torch.zeros(total)
        kept[order[: total - round(total * share * sparsity)]] = 1
        parts = kept.split([w.numel() for w in weights.values()])
        return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}

    for step in range(steps):
        masks = best(min(1.0, (step + 1) / ramp_steps))
        effective = {n: weights[n] * (masks[n] + scores[n] - scores[n].detach()) for n in weights}
        batch = rows[8 * step : 8 * step + 8]
        batch = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        loss = torch.func.functional_call(model, effective, kwargs=batch).loss
        trained = [*scores.values(), *weights.values(), *rest]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        rates = [score_rate] * len(scores) + [rate] * (len(weights) + len(rest))
        with torch.no_grad():
            for parameter, gradient, speed in zip(trained, gradients, rates, strict=True):
                if gradient is not None:
                    parameter -= speed * gradient
        found.append(loss.item())
    return found, scores, {name: mask.bool() for name, mask in best(1.0).items()}


def test_training_equals_the_paper_written_with_autograd(tmp_path):
    model, rows = make(), make_rows(96)
    expected, scores, masks = plain_training(copy.deepcopy(model), rows, 12, 0.05, 0.5, 0.75, ramp_steps=6)
    trainer = make_trainer(
        tmp_path,
        model,
        rows,
        **MOVEMENT,
        soft_ramp=0.5,
        layer_floor=0.0,
        movement_learning_rate=0.5,
        movement_prior=0.0,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(expected, rel=1e-3)
    found = trainer.pruning_state().masks
    for name, score in trainer.run.method._learned.items():
        torch.testing.assert_close(score.data, scores[name].detach(), rtol=1e-2, atol=1e-5)
    assert found.overlap(MaskSet(masks)) > 0.999


def test_scores_pass_the_mask_straight_through_and_weights_train_where_they_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, **MOVEMENT, sparsity=0.5, soft_ramp=0.1)
    method = trainer.run.method
    method.attach(trainer.model)
    method.begin(trainer.args.resolved().plan(12), torch.optim.SGD(trainer.model.parameters(), lr=0.0))
    method.on_step_begin(11)
    gradients, dense = {}, {name: rows.clone() for name, rows in method._trained.items()}
    for name, weight in method.weights.items():
        assert float((weight == 0).float().mean()) > 0.2
        weight.grad = gradients[name] = torch.randn(weight.shape)
        gradients[name] = gradients[name].clone()
    kept = {name: weight.detach() != 0 for name, weight in method.weights.items()}
    method.before_clipping()
    for name, weight in method.weights.items():
        assert torch.equal(weight, dense[name])
        assert torch.equal(method._learned[name].grad, gradients[name] * dense[name])
        assert torch.equal(weight.grad, gradients[name] * kept[name])


@pytest.mark.parametrize("text", ["2:4", "1:4", "channel", "1x4", "2x8"])
@pytest.mark.parametrize("scope", [None, "layer"])
def test_every_pattern_rises_to_its_count(tmp_path, text, scope):
    pattern, given = parse_pattern(text), {} if ":" in text or text == "channel" else {"scope": scope}
    trainer = make_trainer(
        tmp_path, **MOVEMENT, **given, pattern=text, sparsity=None if ":" in text else 0.75, eval_strategy="steps",
        eval_steps=3,
    )  # fmt: skip
    trainer.train()
    masks, target = trainer.pruning_state().masks, trainer.args.resolved().sparsity
    assert masks.kept == pattern.keeps([mask.shape for mask in masks.values()], target)
    assert all(pattern.holds(mask, target) for mask in masks.values())
    risen = [entry["eval_sparsity"] for entry in trainer.state.log_history if "eval_sparsity" in entry]
    assert risen == sorted(risen) and 0 < risen[0] < risen[-1] == masks.sparsity()


def test_scores_of_blocks_are_trained_by_the_sums_of_their_weights(tmp_path):
    trainer = make_trainer(tmp_path, **MOVEMENT, pattern="1x4")
    method = trainer.run.method
    method.attach(trainer.model)
    products = torch.randn(6, 8)
    expected = products.view(6, 2, 4).sum(2).flatten()
    torch.testing.assert_close(method._sums(products), expected)
    torch.testing.assert_close(method._sums(products.t().contiguous().t()), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"movement_learning_rate": 0.0}, "movement_learning_rate=0.0 must be positive"),
        ({"movement_prior": -1.0}, "movement_prior=-1.0 must be at least 0"),
        ({"num_candidates": 2, "frozen_steps": 3}, "num_candidates=2 has no meaning with method='movement'"),
        ({"scope": "balanced"}, "scope='balanced' has no meaning with method='movement' and criterion='magnitude'"),
        ({"criterion": "taylor", "movement_prior": 0.0}, "criterion='taylor' has no meaning with movement_prior=0"),
        ({"levels": [0.5, 0.75]}, "levels and num_levels have no meaning with method='movement'"),
        ({"method": "pdp", "movement_prior": 1.0}, "movement_prior=1.0 has no meaning with method='pdp'"),
        ({"pdp_tau": 1e-3}, "pdp_tau=0.001 has no meaning with method='movement'"),
        ({"proposals": ["taylor:layer"]}, "proposals=.* has no meaning with method='movement'"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **{**MOVEMENT, **changes})


def test_scores_begin_at_the_ranking_of_a_criterion(tmp_path):
    """And from a fitted model, as from magnitudes it begins without a fit."""
    fields = {**MOVEMENT, "frozen_steps": 3, "criterion": "obert", "movement_learning_rate": 1e-9}
    trainer = make_trainer(tmp_path, **fields)
    trainer.train()
    assert trainer.args.resolved().refit_rows == 256 and make_config(tmp_path, **MOVEMENT).resolved().refit_rows == 0
    hard = make_trainer(tmp_path, method="obert", num_levels=1, learning_rate=0.0)
    hard.train()
    assert trainer.pruning_state().masks.overlap(hard.pruning_state().masks) > 0.99


def test_scores_that_diverge_are_named(tmp_path):
    trainer = make_trainer(tmp_path, **MOVEMENT)
    method = trainer.run.method
    method.attach(trainer.model)
    method.begin(trainer.args.resolved().plan(12), torch.optim.SGD(trainer.model.parameters(), lr=0.0))
    name = next(iter(method.weights))
    method._started = True
    method._learned[name].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"score matrix of {name}.*at step 5"):
        method.on_step_begin(5)
