"""Optimizers and schedules that the caller made, or chose."""

import pytest
import torch
from tiny import METHODS, make, make_rows, make_trainer, same, weights_of
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

GUMBEL = METHODS[3]
SEARCH = {"method": "random", "num_candidates": 2, "trial_steps": 2, "refit_rows": 0, "num_levels": 1}


class Own(torch.optim.SGD):
    """An optimizer of which nothing is known."""


def own(model, kind=torch.optim.SGD, **options):
    """Two groups of different rates."""
    head = [p for n, p in model.named_parameters() if "classifier" in n]
    body = [p for n, p in model.named_parameters() if "classifier" not in n]
    return kind([{"params": body, "lr": 0.02}, {"params": head, "weight_decay": 0.5}], lr=0.1, **options)


def halved(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5)


def plan_of(trainer):
    said = []
    trainer._say = said.append
    trainer.train()
    return said[0]


def trial_optimizers(trainer):
    """Those that trials are given, and at which peak they were asked for."""
    found, new = [], trainer.new_optimizer

    def watched(rate):
        found.append((rate, new(rate)))
        return found[-1][1]

    trainer.new_optimizer = watched
    return found


@pytest.mark.parametrize("schedule", [None, halved])
@pytest.mark.parametrize(("rate", "factor"), [(None, 1), (0.01, 0.5)])
def test_trials_have_another_of_the_class_groups_and_options(tmp_path, schedule, rate, factor):
    model = make()
    optimizer = own(model, momentum=0.8, nesterov=True)
    given = (optimizer, None if schedule is None else schedule(optimizer))
    trainer = make_trainer(tmp_path, model, keywords={"optimizers": given}, **SEARCH, trial_learning_rate=rate)
    made = trial_optimizers(trainer)
    trainer.train()
    assert len(made) == 2
    for asked, trial in made:
        assert type(trial) is torch.optim.SGD and trial is not optimizer and asked == pytest.approx(0.02 * factor)
        for group, source, peak in zip(trial.param_groups, optimizer.param_groups, (0.02, 0.1), strict=True):
            assert group["initial_lr"] == pytest.approx(peak * factor)
            assert [group[name] for name in ("momentum", "nesterov")] == [0.8, True]
            assert group["weight_decay"] == source["weight_decay"]
            assert all(a is b for a, b in zip(group["params"], source["params"], strict=True))
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.02, 0.1]


def test_a_class_that_the_trainer_is_given_is_that_of_trials(tmp_path):
    chosen = (torch.optim.SGD, {"lr": 0.02, "momentum": 0.8})
    keywords = {"optimizer_cls_and_kwargs": chosen}
    trainer = make_trainer(tmp_path, keywords=keywords, **SEARCH, trial_learning_rate=0.05)
    made = trial_optimizers(trainer)
    assert "0.02" in plan_of(trainer)
    assert [type(trial) for _, trial in made] == [torch.optim.SGD] * 2
    assert {group["initial_lr"] for _, trial in made for group in trial.param_groups} == {0.05}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adafactor])
def test_a_search_leaves_a_given_optimizer_alone(tmp_path, kind):
    """Whatever its trials do, as long as they choose candidate 0."""
    ends = []
    for trials in (False, True):
        model = make()
        keywords = {"optimizers": (own(model, kind), None)}
        changes = {**SEARCH, "num_candidates": 2 if trials else 1, "trial_steps": 2 if trials else None}
        trainer = make_trainer(tmp_path, model, keywords={**keywords, "selection_dataset": make_rows(16)}, **changes)
        trainer.run.bench.score = lambda: 0.0
        trainer.train()
        ends.append(weights_of(model))
    assert same(*ends)


def test_a_given_optimizer_loses_the_logits_of_the_last_run(tmp_path):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = make_trainer(tmp_path, model, keywords={"optimizers": (optimizer, None)}, **GUMBEL)
    trainer.train()
    groups, states = len(optimizer.param_groups), len(optimizer.state)
    trainer.args.seed = 9
    trainer.train()
    assert (len(optimizer.param_groups), len(optimizer.state)) == (groups, states)


@pytest.mark.parametrize(
    ("kind", "schedule", "named"),
    [(Own, None, "Own, of which"), (torch.optim.SGD, OneCycleLR, "SGD under OneCycleLR")],
)
def test_trials_that_train_need_an_optimizer_that_can_be_made_again(tmp_path, kind, schedule, named):
    def trainer(**changes):
        model = make()
        optimizer = own(model, kind)
        made = schedule and schedule(optimizer, max_lr=0.1, total_steps=20)
        return make_trainer(tmp_path, model, keywords={"optimizers": (optimizer, made)}, **{**SEARCH, **changes})

    with pytest.raises(ValueError, match=f"optimizers holds {named}.* optimizer_cls_and_kwargs"):
        trainer()
    trainer(num_candidates=1, trial_steps=None).train()
    trainer(trial_steps=None, refit_rows=16).train()  # masks that are compared as they are fitted
    albert = make("Albert")  # of which nothing can be fitted
    keywords = {"optimizers": (own(albert, Own), None)}
    late = make_trainer(tmp_path, albert, keywords=keywords, **{**SEARCH, "trial_steps": None, "refit_rows": 16})
    with pytest.raises(ValueError, match="optimizers holds Own"):
        late.train()


def test_the_plan_says_whose_the_rates_are(tmp_path):
    told = plan_of(make_trainer(tmp_path))
    assert "  0.001  " in told and "caller" not in told
    model = make()
    optimizer = own(model)
    told = plan_of(make_trainer(tmp_path, model, keywords={"optimizers": (optimizer, None)}))
    assert "  0.02  " in told and told.endswith("Your own SGD")
    model = make()
    optimizer = own(model)
    trainer = make_trainer(tmp_path, model, keywords={"optimizers": (optimizer, halved(optimizer))})
    told = plan_of(trainer)
    assert told.count("(its own)") == 2 and "Your own SGD and LambdaLR: its rates do not restart" in told
    rates = {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert rates == {0.01}
