"""The refit of a soft method when its mask hardens: its targets, its record and what is refused."""

import pytest
import torch
from tiny import make, make_config, make_trainer

from hf_maskselect import prunable_weights
from hf_maskselect.search import bench as bench_module
from hf_maskselect.training.search_cost import Workload, search_cost

SOFT = {"num_levels": None, "frozen_steps": 3, "pruning_warmup_steps": 2}
each_method = pytest.mark.parametrize("method", ["pdp", "gumbel"])


@each_method
def test_the_refit_aims_at_the_weights_that_the_soft_phase_began_with(tmp_path, monkeypatch, method):
    seen, aims, refit_to = [], bench_module.dense_outputs, bench_module.refit_to

    def watched_aims(model, weights, before, *rest):
        seen.append({name: before[name] for name in weights})
        return aims(model, weights, before, *rest)

    def watched(*given):
        seen.append(refit_to(*given))
        return seen[-1]

    monkeypatch.setattr(bench_module, "dense_outputs", watched_aims)
    monkeypatch.setattr(bench_module, "refit_to", watched)
    changes = {"pruning_warmup_steps": 0, "learning_rate": 1e-2}
    scale = {"gumbel_scale_learning_rate": 0.1} if method == "gumbel" else {}
    trainer = make_trainer(tmp_path, method=method, **{**SOFT, **changes, **scale})
    begun = {name: weight.detach().clone() for name, weight in prunable_weights(trainer.model).items()}
    trainer.train()
    targets, done = seen
    assert all(torch.equal(targets[name], weight.bfloat16()) for name, weight in begun.items())
    assert done.refitted and done.mean_refit_error < done.mean_cut_error
    (search,) = trainer.run.search.history
    assert (search.cut_error, search.refit_error) == (done.mean_cut_error, done.mean_refit_error)
    assert trainer.pruning_state().masks.sparsity() == 0.75 and not trainer.run.method.targets()


@each_method
def test_samples_and_refit_count_in_the_cost_and_in_its_forecast(tmp_path, method):
    changes = {**SOFT, "method": method}
    trainer = make_trainer(tmp_path, **changes)
    trainer.train()
    model = make()
    sizes = model.num_parameters(), sum(weight.numel() for weight in prunable_weights(model).values())
    forecast = search_cost(Workload(make_config(tmp_path, **changes), *sizes, 96), 1)
    (search,) = trainer.run.search.history
    assert search.step_equivalents == pytest.approx(forecast.compute) and search.step_equivalents > 4


@each_method
def test_candidates_are_scored_right_after_their_refit(tmp_path, method):
    trainer = make_trainer(tmp_path, method=method, **SOFT, num_candidates=3)
    trainer.train()
    (search,) = trainer.run.search.history
    assert all(c.steps == 0 and len(c.scores) == 1 for c in search.candidates) and len(search.candidates) > 1
    assert search.refit_error < search.cut_error


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"method": "pdp"}, 256),
        ({"method": "gumbel"}, 256),
        ({"method": "pdp", "pdp_tau": 1e-4}, 0),
        ({"method": "pdp", "frozen_steps": 0}, 0),
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
        ({"method": "pdp", "frozen_steps": 0}, "refit_rows=8 has no meaning with method='pdp' and frozen_steps=0"),
        (
            {"method": "gumbel", "gumbel_untrained": True, "sparsity": None},
            "refit_rows=8 has no meaning with gumbel_budget=False",
        ),
    ],
)
def test_a_refit_needs_a_budget_and_steps_after_it(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **{**SOFT, **changes, "refit_rows": 8})


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"method": "pdp"}, 0.7),
        ({"method": "gumbel"}, 0.7),
        ({"method": "movement", "criterion": "fisher"}, 0.7),
        ({"method": "movement"}, 0.2),
        ({"method": "pdp", "pdp_tau": 1e-3}, 0.2),
        ({"method": "gumbel", "gumbel_untrained": True, "sparsity": None}, 0),
        ({"method": "pdp", "frozen_steps": 5}, 5),
    ],
)
def test_most_steps_follow_the_refit(tmp_path, changes, share):
    assert make_config(tmp_path, num_levels=None, **changes).resolved().frozen_steps == share
