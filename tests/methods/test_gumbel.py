"""Gumbel subnetworks: training equals an independent implementation, weights stay frozen, the end is exact."""

import copy

import pytest
import torch
from tiny import losses, make, make_rows, make_trainer, weights_of
from transformers import AutoModelForSequenceClassification

from hf_maskselect import MaskSet, PruningState, prunable_weights, verify
from hf_maskselect.masking.patterns import parse_pattern
from hf_maskselect.storage.state import load_method_state
from hf_maskselect.utils.seeds import key_seed

GUMBEL = {"method": "gumbel", "num_levels": None, "frozen_steps": 0}
PAPER = {**GUMBEL, "sparsity": None, "gumbel_untrained": True}


def plain_training(model, rows, steps, *, logit_rate, scale_rate, rate, seed):
    """The paper's rule by autograd with torch's own straight-through: two-class Gumbel-Softmax over [logit, 0], one
    scale a matrix, plain SGD. The difference of the two Gumbels is taken from the run's keyed uniforms. Returns the
    losses, logits and scales."""
    weights = prunable_weights(model)
    head = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n.startswith("classifier")}
    logits = {name: torch.zeros_like(w).requires_grad_() for name, w in weights.items()}
    scales = {name: torch.ones(()).requires_grad_() for name in weights}
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(key_seed(seed, "gumbel", step))
        effective = dict(head)
        for name, weight in weights.items():
            noise = torch.rand(weight.shape, generator=generator).logit()
            soft = torch.softmax(torch.stack([logits[name] + noise, torch.zeros_like(noise)]), 0)[0]
            mask = (soft > 0.5).float() + soft - soft.detach()
            effective[name] = scales[name] * weight.detach() * mask
        batch = rows[8 * step : 8 * step + 8]
        batch = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        loss = torch.func.functional_call(model, effective, kwargs=batch).loss
        trained = [*logits.values(), *scales.values(), *head.values()]
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            norm = float(torch.stack([g.norm() for g in gradients[-len(head) :]]).norm())
            rates = [logit_rate] * len(logits) + [scale_rate] * len(scales)
            rates += [rate * min(1.0, 1.0 / (norm + 1e-6))] * len(head)
            for parameter, gradient, speed in zip(trained, gradients, rates, strict=True):
                parameter -= speed * gradient
        found.append(loss.item())
    return found, logits, scales


def test_training_equals_the_paper_written_with_autograd(tmp_path):
    model, rows = make(), make_rows(96)
    expected, logits, scales = plain_training(
        copy.deepcopy(model), rows, 12, logit_rate=50.0, scale_rate=0.1, rate=0.1, seed=7
    )
    trainer = make_trainer(
        tmp_path,
        model,
        rows,
        **PAPER,
        gumbel_signed_constant=False,
        gumbel_learning_rate=50.0,
        gumbel_scale_learning_rate=0.1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )
    before = weights_of(model)
    trainer.train()
    assert losses(trainer) == pytest.approx(expected, rel=1e-3)
    after = weights_of(model)
    for name, mask in trainer.pruning_state().masks.items():
        torch.testing.assert_close(trainer.run.method._learned[name].data, logits[name].detach(), rtol=1e-3, atol=1e-4)
        assert torch.equal(mask, trainer.run.method._learned[name] >= 0)
        torch.testing.assert_close(after[name], before[name] * mask * scales[name].detach(), rtol=1e-4, atol=1e-6)
    frozen = {n for n in before if n.startswith("bert.")} - set(prunable_weights(model))
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_an_untrained_body_has_the_papers_defaults(tmp_path):
    pretrained, untrained = (make_trainer(tmp_path, **given).run.settings.gumbel for given in (GUMBEL, PAPER))
    assert (pretrained.logit_rate, untrained.logit_rate) == (0.1, 0.05)
    assert (pretrained.prior, untrained.prior) == (10, 0)
    assert (pretrained.train_rest, untrained.train_rest) == (True, False)


def test_the_sparsity_emerges_and_is_written_as_it_came_out(tmp_path):
    trainer = make_trainer(tmp_path, **PAPER, gumbel_learning_rate=5.0)
    trainer.train()
    trainer.save_model()
    state = verify(tmp_path)
    assert state.sparsity == state.masks.sparsity() == trainer.model.config.pruning["achieved"]
    assert 0.1 < state.sparsity < 0.9 and state.sparsity != 0.5


def test_a_dense_checkpoint_never_wins_where_the_sparsity_emerges(tmp_path):
    ranks = iter(range(100, 0, -1))
    trainer = make_trainer(
        tmp_path,
        **PAPER,
        pruning_warmup_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        keywords={"compute_metrics": lambda prediction: {"rank": next(ranks)}},
    )
    trainer.train()
    assert trainer.state.best_global_step == 6 and 0.1 < MaskSet.from_zeros(trainer.model).sparsity() < 0.9


@pytest.mark.parametrize("changes", [{}, {"frozen_steps": 3, "level_eval_steps": 1}, {"max_grad_norm": 0.0}])
def test_half_precision_level_best_and_no_clipping(tmp_path, changes):
    model = make().to(torch.bfloat16) if not changes else make()
    trainer = make_trainer(tmp_path, model, **{**GUMBEL, **changes})
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).masks.sparsity() == 0.75
    assert all(weight.data.dtype == model.dtype for weight in trainer.run.method.weights.values())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_samples_keep_the_budget_along_the_ramp(tmp_path, scope):
    kept = []
    trainer = make_trainer(tmp_path, **GUMBEL, scope=scope, soft_ramp=0.8, gumbel_initial_logit=-2.0)
    effective = trainer.run.method.effective

    def watched(name, weight):
        found = effective(name, weight)
        kept.append((trainer.state.global_step, int(found.count_nonzero()), found.numel()))
        return found

    trainer.run.method.effective = watched
    trainer.train()
    for step in range(12):
        drawn, total = (sum(k[i] for k in kept if k[0] == step) for i in (1, 2))
        expected = 1 - 0.75 * min(1, (step + 1) / 10)
        assert drawn / total == pytest.approx(expected, abs=4 * (0.25 / total) ** 0.5)
    masks = trainer.pruning_state().masks
    same_everywhere = len({m.float().mean().item() for m in masks.values()}) == 1
    assert same_everywhere == (scope == "layer")


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("1:4", 0.25)])
def test_groups_keep_n_of_m(tmp_path, pattern, share):
    trainer = make_trainer(tmp_path, **{**GUMBEL, "sparsity": None}, pattern=pattern)
    trainer.train()
    assert all((mask.view(-1, 4).sum(1) == 4 * share).all() for mask in trainer.pruning_state().masks.values())


def test_the_signed_constant_and_the_rest_of_the_body(tmp_path):
    model = make()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, **PAPER, gumbel_rescale=False, gumbel_train_rest=True)
    trainer.train()
    after = weights_of(model)
    for name, mask in trainer.pruning_state().masks.items():
        assert torch.equal(after[name], before[name].sign() * before[name].std() * mask)
    assert not torch.equal(
        before["bert.encoder.layer.0.output.dense.bias"], after["bert.encoder.layer.0.output.dense.bias"]
    )


def test_a_checkpoint_is_plain_sparse_and_scaled(tmp_path):
    trainer = make_trainer(tmp_path, **GUMBEL, gumbel_scale_learning_rate=0.1, save_strategy="steps", save_steps=6)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    masks, state = PruningState.load(folder).masks, load_method_state(folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    for name, mask in masks.items():
        assert float(state[f"scale.{name}"]) != 1
        assert torch.equal(loaded.get_parameter(name), state[f"dense.{name}"] * state[f"scale.{name}"] * mask)


def test_a_matrix_with_one_live_weight_keeps_it(tmp_path):
    model = make()
    name = "bert.encoder.layer.0.output.dense.weight"
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight.mul_(torch.arange(weight.numel()).view(weight.shape) == 5)
    trainer = make_trainer(tmp_path, model, **GUMBEL)
    trainer.train()
    assert all(bool(torch.isfinite(logits).all()) for logits in trainer.run.method._learned.values())
    assert trainer.pruning_state().masks[name].view(-1)[5]


def test_candidates_are_samples_tried_when_the_mask_hardens(tmp_path):
    trainer = make_trainer(tmp_path, **{**GUMBEL, "frozen_steps": 4}, num_candidates=3, trial_steps=2)
    before = weights_of(trainer.model)
    trainer.train()
    (search,) = trainer.run.search.history
    assert search.step == 8 and len({c.digest for c in search.candidates}) == 3
    assert trainer.pruning_state().masks.sparsity() == 0.75
    name = next(iter(trainer.pruning_state().masks))
    after, scale = weights_of(trainer.model)[name], trainer.run.method._scales[name].data
    alive = after != 0
    assert not torch.equal(after[alive], (before[name] * scale)[alive])  # the frozen phase trains the weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gumbel_tau": 0.0}, "gumbel_tau=0.0 must be positive"),
        (
            {"scope": "balanced", "criterion": "magnitude"},
            "scope='balanced' has no meaning with method='gumbel' and crit",
        ),
        ({"gumbel_budget": False}, "sparsity=0.75 has no meaning with gumbel_budget=False"),
        ({"gumbel_budget": False, "sparsity": None, "pattern": "2:4"}, "needs gumbel_budget=True"),
        ({"gumbel_scale_learning_rate": -1.0}, "gumbel_scale_learning_rate=-1.0 must be positive"),
        ({"gumbel_budget": "false"}, "gumbel_budget='false' must be true or false"),
        ({"gumbel_untrained": True, "gumbel_prior": 1.0, "sparsity": None}, "gumbel_prior=1.0 has no meaning"),
        (
            {"method": "pdp", "gumbel_tau": 2.0},
            "gumbel_tau=2.0 has no meaning with method='pdp', since it belongs to gumbel",
        ),
        (
            {**PAPER, "num_candidates": 2, "frozen_steps": 4},
            "num_candidates=2 has no meaning with gumbel_budget=False",
        ),
        ({"criterion": "taylor", "gumbel_prior": 0.0}, "criterion='taylor' has no meaning with gumbel_prior=0"),
        ({"criterion_batches": 0}, "criterion_batches=0 gives criterion='taylor' no gradients"),
        ({"num_candidates": 2}, "num_candidates=2 needs steps under the hard mask"),
        ({"gumbel_learning_rate": -1.0}, "gumbel_learning_rate=-1.0 must be positive"),
        ({"gumbel_learning_rate": 0.0}, "gumbel_learning_rate=0.0 must be positive"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{**GUMBEL, **changes})


@pytest.mark.parametrize("scope", ["layer", "balanced", "global"])
def test_logits_start_at_the_standardized_log_of_scores_over_all_matrices(tmp_path, scope):
    found = []
    trainer = make_trainer(tmp_path, **GUMBEL, criterion="fisher", scope=scope)
    method, bench = trainer.run.method, trainer.run.bench
    begin = method.take_scores

    def watched(score_of, degree):
        begin(score_of, degree)
        stats, pattern = bench.gradient_stats({"square"}, 0), parse_pattern("unstructured", scope)
        scores = {n: (w.detach().square() * stats.of(n).square) for n, w in method.weights.items()}
        logs = {n: pattern.comparable(score).double().log() for n, score in scores.items()}
        of_all = torch.cat([log.flatten() for log in logs.values()])
        finite = of_all[of_all.isfinite()]
        for name, log in logs.items():
            z = (log - finite.mean()) / finite.std(correction=0)
            expected = torch.where(log.isfinite(), 3 + 10 * z, 3 - 40.0).float()
            torch.testing.assert_close(method._learned[name].data, expected, rtol=1e-3, atol=1e-3)
        found.append(pattern.masks(scores, 0.75))
        return {}

    method.take_scores = watched
    trainer.train()
    (expected,) = found
    assert MaskSet(expected).overlap(trainer.pruning_state().masks) > 0.5  # twelve steps move few logits that far
    settings = trainer.run.settings
    assert (settings.gumbel.prior, settings.gumbel.logit_rate, settings.soft_ramp) == (10, 0.1, 0.3)
