"""The refit of a soft method: when it happens, towards which weights, its record and what is refused."""

import pytest
import torch
from tiny import make, make_config, make_trainer, same, weights_of

from hf_maskselect import prunable_weights
from hf_maskselect.masking.patterns import parse_pattern
from hf_maskselect.methods.factors import refitted_factors
from hf_maskselect.search import bench as bench_module
from hf_maskselect.search import search as search_module
from hf_maskselect.training.search_cost import Workload, search_cost

SOFT = {"num_levels": None, "frozen_steps": 3, "pruning_warmup_steps": 2}
MOVEMENT = {"method": "movement", "criterion": "taylor"}
each_method = pytest.mark.parametrize("method", ["pdp", "gumbel"])
trains_weights = pytest.mark.parametrize("fields", [{"method": "pdp"}, MOVEMENT], ids=["pdp", "movement"])


@trains_weights
def test_the_soft_phase_begins_from_a_fitted_model(tmp_path, monkeypatch, fields):
    """Of the mask that it would end with; the pruned weights keep their values, so that they can return."""
    aims, done, seen = [], [], []
    dense_outputs, refit_to = bench_module.dense_outputs, bench_module.refit_to

    def watched_aims(model, weights, before, *rest):
        aims.append({name: before[name].clone() for name in weights})
        return dense_outputs(model, weights, before, *rest)

    def watched_refit(dense, model, weights):
        done.append(refit_to(dense, model, weights))
        return done[-1]

    monkeypatch.setattr(bench_module, "dense_outputs", watched_aims)
    monkeypatch.setattr(bench_module, "refit_to", watched_refit)
    trainer = make_trainer(tmp_path, **fields, **SOFT)
    own, take_fit = trainer.run.method, trainer.run.method.take_fit

    def watched(before, masks):
        fitted = {name: weight.detach().clone() for name, weight in own.weights.items()}
        take_fit(before, masks)
        seen.append((trainer.state.global_step, masks, fitted, weights_of(trainer.model), own.candidate(None, 0)))

    own.take_fit = watched
    trainer.train()
    ((step, masks, fitted, begun, ranked),) = seen  # once
    assert step == 2 and masks.sparsity() == 0.75 and len(aims) == len(done) == 1
    for name, mask in masks.items():
        assert torch.equal(begun[name], torch.where(mask, fitted[name], aims[0][name]))
        assert not bool(fitted[name][~mask].any()) and not torch.equal(fitted[name][mask], aims[0][name][mask])
    assert masks.overlap(ranked) > 0.9  # the fitted weights rank nearly as before
    assert done[0].refitted and done[0].mean_refit_error < done[0].mean_cut_error
    (logged,) = (entry for entry in trainer.state.log_history if "soft_fit_error" in entry)
    assert logged["soft_fit_error"] == pytest.approx(done[0].mean_refit_error, abs=1e-6)
    assert trainer.pruning_state().masks.sparsity() == 0.75


def test_a_refit_changes_a_factor_at_most_fourfold():
    before = torch.tensor([0.0, 1.0, 1.0, 1.0, -1.0, 2.0])
    weight = torch.tensor([0.0, 1.0, 0.5, 0.0, 10.0, -4.0])
    factor = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, 60000.0]).half()
    assert refitted_factors(factor, before, weight).tolist() == [3, 3, 6, 12, 0.75, 30000]
    assert refitted_factors(None, before, weight).tolist() == [1, 1, 2, 4, 0.25, 0.5]


@trains_weights
def test_a_fit_that_fails_leaves_the_run_as_it_was(tmp_path, fields):
    trainer = make_trainer(tmp_path, **fields, **{**SOFT, "pruning_warmup_steps": 0})
    before = weights_of(trainer.model)

    def fail(*_):
        raise RuntimeError("out of memory")

    trainer.run.bench.refit = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert same(before, weights_of(trainer.model))
    assert trainer.run.method.soft_phase_due(0)


@trains_weights
def test_a_run_resumes_after_its_fit_to_the_same_bits(tmp_path, fields):
    fields = {**SOFT, **fields, "save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path, **fields)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **fields)
    resumed.run.search.begin_soft_phase = lambda: pytest.fail("it has begun")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(weights_of(whole.model), weights_of(resumed.model))


@trains_weights
@pytest.mark.parametrize("pattern", ["1:4", "1x4", "channel"])
def test_a_fitted_run_ends_exact_with_every_pattern_and_keeps_earlier_zeros(tmp_path, fields, pattern):
    model = make()
    weight = model.bert.encoder.layer[0].output.dense.weight
    zeros = weight[:8] if pattern == "channel" else weight[:, ::8]
    with torch.no_grad():
        zeros.zero_()
    sparsity = {} if ":" in pattern else {"sparsity": 0.75}
    trainer = make_trainer(tmp_path, model, **{**SOFT, **fields, "sparsity": None, **sparsity}, pattern=pattern)
    trainer.train()
    masks = trainer.pruning_state().masks
    assert masks.sparsity() == 0.75 and not bool(zeros.any())
    assert all(parse_pattern(pattern).holds(mask, 0.75) for mask in masks.values())


@trains_weights
def test_a_step_without_memory_is_made_again_from_the_same_fit(tmp_path, fields):
    """With `auto_find_batch_size` the loop runs again. What the model has lost since would be a poor target."""
    changes = {**SOFT, **fields, "pruning_warmup_steps": 0}
    trainer = make_trainer(tmp_path, auto_find_batch_size=True, **changes)
    begins, begin, step = [], trainer.run.search.begin_soft_phase, trainer.training_step

    def counted():
        begins.append(trainer._train_batch_size)
        return begin()

    def without_memory(*given, **named):
        if trainer._train_batch_size == 8:
            raise RuntimeError("CUDA out of memory.")
        return step(*given, **named)

    trainer.run.search.begin_soft_phase, trainer.training_step = counted, without_memory
    trainer.train()
    assert begins == [8] and trainer._train_batch_size < 8
    state = trainer.pruning_state()
    assert (state.start, state.masks.sparsity()) == (0, 0.75)
    trainer.training_step = step
    trainer.train()
    assert len(begins) == 2  # another run begins anew


@trains_weights
def test_the_plan_and_the_schedule_say_that_the_soft_phase_begins_at_the_target(tmp_path, fields, capsys):
    trainer = make_trainer(tmp_path, **{**SOFT, **fields, "pruning_warmup_steps": 0, "learning_rate": 0.1})
    trainer.train()
    printed = capsys.readouterr().out
    (soft,) = (line for line in printed.splitlines() if line.startswith("soft"))
    assert soft.split()[:3] == ["soft", "0.7500", "0-8"] and "(one schedule)" in printed
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 12


def test_layers_that_cannot_be_refitted_are_told_with_a_remedy(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(search_module.logger, "warning_once", told.append)
    make_trainer(tmp_path, make("Albert"), method="pdp", **SOFT).train()
    assert len(told) == 1 and "matrices were not refitted" in told[0] and "soft_ramp lets the sparsity" in told[0]


@pytest.mark.parametrize(
    "changes",
    [{"method": "gumbel"}, {"method": "pdp"}, {"method": "pdp", "frozen_steps": 0}, MOVEMENT],
    ids=["gumbel", "pdp", "hardened last", "movement"],
)
def test_samples_and_refit_count_in_the_cost_and_in_its_forecast(tmp_path, changes):
    changes = {**SOFT, **changes}
    trainer = make_trainer(tmp_path, **changes)
    trainer.train()
    model = make()
    sizes = model.num_parameters(), sum(weight.numel() for weight in prunable_weights(model).values())
    forecast = search_cost(Workload(make_config(tmp_path, **changes), *sizes, 96), 1)
    found = trainer.search_summary()["search_step_equivalents"]
    assert (
        found == pytest.approx(forecast.compute, abs=0.06) and found > 4 and trainer.search_summary()["search_seconds"]
    )


def test_gumbel_is_refitted_when_its_mask_hardens_towards_the_weights_without_scales(tmp_path, monkeypatch):
    seen, aims, refit_to = [], bench_module.dense_outputs, bench_module.refit_to

    def watched_aims(model, weights, before, *rest):
        seen.append({name: before[name] for name in weights})
        return aims(model, weights, before, *rest)

    def watched(*given):
        seen.append(refit_to(*given))
        return seen[-1]

    monkeypatch.setattr(bench_module, "dense_outputs", watched_aims)
    monkeypatch.setattr(bench_module, "refit_to", watched)
    changes = {"pruning_warmup_steps": 0, "learning_rate": 1e-2, "gumbel_scale_learning_rate": 0.1}
    trainer = make_trainer(tmp_path, method="gumbel", **{**SOFT, **changes})
    begun = weights_of(trainer.model)
    trainer.train()
    targets, done = seen
    assert all(torch.equal(target, begun[name].bfloat16()) for name, target in targets.items())
    assert done.refitted and done.mean_refit_error < done.mean_cut_error
    (search,) = trainer.run.search.history
    assert (search.cut_error, search.refit_error) == (done.mean_cut_error, done.mean_refit_error)
    assert trainer.pruning_state().masks.sparsity() == 0.75 and not trainer.run.method.targets()


@pytest.mark.parametrize(("method", "trains"), [("pdp", True), ("gumbel", False)])
def test_candidates_train_from_the_soft_model_or_are_scored_after_their_refit(tmp_path, method, trains):
    trainer = make_trainer(tmp_path, method=method, **SOFT, num_candidates=3)
    trainer.train()
    (search,) = trainer.run.search.history
    assert len(search.candidates) > 1 and all(bool(candidate.steps) == trains for candidate in search.candidates)
    assert bool(search.refit_error) != trains


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"method": "pdp"}, 256),
        ({"method": "gumbel"}, 256),
        ({"method": "pdp", "pdp_tau": 1e-4}, 0),
        ({"method": "pdp", "frozen_steps": 0}, 256),
        ({"method": "pdp", "soft_ramp": 0.5}, 0),
        ({"method": "gumbel", "soft_ramp": 0.5}, 256),
        ({"method": "gumbel", "frozen_steps": 0}, 0),
        ({"method": "gumbel", "criterion": "magnitude"}, 0),
        ({"method": "gumbel", "gumbel_untrained": True, "sparsity": None}, 0),
        ({"method": "pdp", "pdp_tau": 1e-4, "refit_rows": 8}, 8),
    ],
)
def test_the_papers_settings_have_no_refit_and_the_defaults_have_one(tmp_path, changes, rows):
    assert make_config(tmp_path, **{**SOFT, **changes}).resolved().refit_rows == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "pdp", "soft_ramp": 0.5}, "soft_ramp=0.5 has no meaning with refit_rows=8"),
        ({"method": "gumbel", "frozen_steps": 0}, "refit_rows=8 has no meaning with method='gumbel' and frozen_ste"),
        (
            {"method": "gumbel", "gumbel_untrained": True, "sparsity": None},
            "refit_rows=8 has no meaning with gumbel_budget=False",
        ),
    ],
)
def test_a_refit_needs_a_budget_and_takes_the_place_of_the_ramp(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **{**SOFT, **changes, "refit_rows": 8})


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"method": "pdp"}, 0.3),
        ({"method": "gumbel"}, 0.7),
        ({"method": "movement", "criterion": "fisher"}, 0.3),
        ({"method": "movement"}, 0.2),
        ({"method": "pdp", "pdp_tau": 1e-3}, 0.2),
        ({"method": "gumbel", "gumbel_untrained": True, "sparsity": None}, 0),
        ({"method": "pdp", "frozen_steps": 5}, 5),
    ],
)
def test_the_share_of_frozen_steps_goes_by_method_and_criterion(tmp_path, changes, share):
    assert make_config(tmp_path, num_levels=None, **changes).resolved().frozen_steps == share
