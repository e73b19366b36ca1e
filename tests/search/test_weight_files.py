"""Halving that goes on from the trained weights: nothing is trained twice, and the run takes the winner's over."""

import doctest

import pytest
import torch
from tiny import losses, make, make_rows, make_trainer, same, weights_of
from tqdm import tqdm

from hf_maskselect.masking.maskset import MaskSet
from hf_maskselect.search import schedule as rungs
from hf_maskselect.search.bench import Trial
from hf_maskselect.search.continued import FOLDER, ContinuedTrials
from hf_maskselect.search.results import Candidate
from hf_maskselect.search.sharing import Team
from hf_maskselect.utils import processes as ranks

RUN = {"method": "random", "num_candidates": 4, "selection": "survivors", "trial_steps": 2, "max_steps": 24}


def stop_trials(trainer, after):
    """Interrupts the trial that follows so many; returns the list of those that were finished."""
    trial, done = trainer.run.bench.trial, []

    def watched(*args):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(trial(*args))
        return done[-1]

    trainer.run.bench.trial = watched
    return done


def test_every_rung_brings_the_training_to_twice_the_steps():
    assert rungs.survivor_rungs(8, 30, 120) == [(8, 30), (4, 30), (2, 60)]
    assert rungs.survivor_rungs(4, 30, 120) == [(4, 30), (2, 30)]
    assert rungs.survivor_rungs(12, 30, 100) == [(12, 30), (6, 30), (3, 40)]
    assert rungs.survivor_rungs(3, 5, 5) == [(3, 5)]
    for module in (ranks, rungs):
        assert doctest.testmod(module).failed == 0


def test_an_eighth_of_the_level_by_default(tmp_path):
    """But not where an eighth is so short that it orders good masks the wrong way round."""
    trainer = make_trainer(tmp_path, **{**RUN, "trial_steps": None, "num_candidates": 8})
    expected = {1200: [(8, 50), (4, 50), (2, 100)], 600: [(8, 40), (4, 40), (2, 20)], 30: [(8, 5)]}
    for steps, rungs_of_level_1 in expected.items():
        plan = trainer.run.settings.plan(steps)
        assert plan.length(0) == steps // 3 and trainer.run.search.rungs(plan, 0) == rungs_of_level_1


def test_the_run_goes_on_from_the_winners_weights(tmp_path):
    """Winner's training = its rungs one after the other; what the model holds after the choice is the end of it."""
    trainer = make_trainer(tmp_path, keywords={"selection_dataset": make_rows(16, seed=2)}, **RUN)
    ended, chosen, trial, choose = {}, [], trainer.run.bench.trial, trainer.run.search.choose

    def watched_trial(load_masks, trial_, level, bar, load_start=None):
        score = trial(load_masks, trial_, level, bar, load_start)
        digest = load_masks().digest()
        if trial_.before:
            assert same(load_start(), ended[level, digest, trial_.before])
        ended[level, digest, trial_.before + trial_.steps] = {
            n: t.clone() for n, t in trainer.run.bench.sandbox.trained().items()
        }
        return score

    def watched_choose(level, plan, step):
        random_state = torch.get_rng_state()
        masks, search = choose(level, plan, step)
        assert torch.equal(random_state, torch.get_rng_state())
        chosen.append((masks.digest(), search))
        end = ended[level, masks.digest(), 4]
        assert all(torch.equal(weight, end[name]) for name, weight in trainer.model.named_parameters())
        return masks, search

    trainer.run.bench.trial, trainer.run.search.choose = watched_trial, watched_choose
    trainer.train()
    assert len(chosen) == 2
    for digest, search in chosen:
        assert [len(c.scores) for c in search.candidates].count(2) == 2
        assert next(c for c in search.candidates if c.chosen).digest == digest
        assert {c.steps for c in search.candidates} == {2, 4}
    assert MaskSet.from_zeros(trainer.model).sparsity() == 0.75
    assert not (tmp_path / FOLDER).exists()


def test_a_longer_training_sees_other_rows(tmp_path):
    trainer = make_trainer(tmp_path, keywords={"selection_dataset": make_rows(8)}, **RUN)
    trainer.run.method.attach(trainer.model)
    masks, seen, compute_loss = MaskSet.ones(trainer.run.method.weights), [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        if model.training:
            seen.append(inputs["input_ids"].clone())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    with trainer.run.bench.sandbox.untouched():
        for before in (0, 0, 2):
            trainer.run.bench.trial(lambda: masks, Trial(1, 1e-3, 1, before), 0, tqdm(disable=True))
    first, again, later = seen
    assert torch.equal(first, again) and not torch.equal(first, later)


@pytest.mark.slow
def test_a_search_that_was_killed_repeats_no_trial(tmp_path):
    def run(folder, stop_after=None):
        trainer = make_trainer(folder, make(), keywords={"selection_dataset": make_rows(16, seed=2)}, **RUN)
        done = stop_trials(trainer, stop_after)
        if stop_after is None:
            trainer.train()
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        return trainer, len(done)

    whole, trials = run(tmp_path / "whole")
    assert trials == 2 * (4 + 2)
    for stop_after in (3, 5):  # inside the first rung, inside the second
        run(tmp_path / str(stop_after), stop_after)
        again, repeated = run(tmp_path / str(stop_after))
        assert repeated == trials - stop_after
        assert losses(again) == losses(whole) and same(weights_of(again.model), weights_of(whole.model))
        scores = [[c.scores for c in s.candidates] for s in again.run.search.history]
        assert scores == [[c.scores for c in s.candidates] for s in whole.run.search.history]


@pytest.mark.parametrize("refit_rows", [0, pytest.param(32, marks=pytest.mark.slow)])
def test_weights_that_diverged_are_not_taken_over(tmp_path, refit_rows):
    """The run goes on from its own, cut and fitted as without trials."""
    keywords = {"selection_dataset": make_rows(16, seed=2)}
    trainer = make_trainer(tmp_path, keywords=keywords, **RUN, refit_rows=refit_rows)
    trial, put = trainer.run.bench.trial, []

    def diverging(*args):
        trial(*args)
        return float("nan")

    trainer.run.bench.trial = diverging
    choose = trainer.run.search.choose

    def watched_choose(*args):
        before = weights_of(trainer.model)
        masks = choose(*args)
        put.append(same(before, weights_of(trainer.model)))
        return masks

    trainer.run.search.choose = watched_choose
    trainer.train()
    assert put == [not refit_rows] * 2 and all(s.candidates[0].chosen for s in trainer.run.search.history)
    assert all((s.refit_error is not None) == bool(refit_rows) for s in trainer.run.search.history)


def test_a_level_never_ends_worse_than_the_weights_it_took_over(tmp_path):
    """Every later score is called infinite: the model ends as the winner's trials left it."""
    keywords = {"selection_dataset": make_rows(16, seed=2)}
    trainer = make_trainer(tmp_path, keywords=keywords, **RUN, level_eval_steps=2)
    trainer._processes.first = lambda score: float("inf")
    choose, taken = trainer.run.search.choose, []

    def watched_choose(*args):
        masks = choose(*args)
        taken.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
        return masks

    trainer.run.search.choose = watched_choose
    trainer.train()
    assert all(torch.equal(weight, taken[-1][name]) for name, weight in trainer.model.named_parameters())


@pytest.mark.slow
def test_a_killed_search_of_other_rungs_begins_anew(tmp_path):
    """The same run with longer trials: what shorter ones left is not taken for it."""

    def run(folder, trial_steps, stop_after=None):
        changes = {**RUN, "trial_steps": trial_steps, "num_levels": 1}
        trainer = make_trainer(folder, make(), keywords={"selection_dataset": make_rows(16, seed=2)}, **changes)
        done = stop_trials(trainer, stop_after)
        trainer.run.bench.identity.of_search = lambda *_: {"part": "the same"}
        if stop_after is None:
            trainer.train()
            return weights_of(trainer.model), len(done)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()

    expected = run(tmp_path / "whole", 3)
    run(tmp_path / "killed", 2, stop_after=5)
    found = run(tmp_path / "killed", 3)
    assert found[1] == expected[1] and same(found[0], expected[0])


@pytest.mark.parametrize("method", ["pdp", "gumbel"])
def test_soft_methods_can_race_survivors_under_the_frozen_mask(tmp_path, method):
    trainer = make_trainer(tmp_path, **{**RUN, "method": method, "num_levels": None, "frozen_steps": 8})
    trainer.train()
    (search,) = trainer.run.search.history
    assert [len(c.scores) for c in search.candidates].count(2) == 2
    assert MaskSet.from_zeros(trainer.model).sparsity() == 0.75


def test_files_of_another_search_go(tmp_path):
    candidate = Candidate(1, "votes", None, 1.0, "d" * 64)
    trials = ContinuedTrials(tmp_path, Team(ranks.Processes(), None))
    trials.open("a" * 64)
    assert trials.scores(candidate) == {} and trials.start_of(candidate) is None
    trials.keep(candidate, 2, 0.5, {"w": torch.ones(3)})
    candidate.steps = 2
    trials.keep(candidate, 2, 0.25, {"w": torch.zeros(3)})
    assert trials.scores(candidate) == {2: 0.5, 4: 0.25}
    assert torch.equal(trials.start_of(candidate)()["w"], torch.zeros(3))
    trials.open("a" * 64)
    assert trials.scores(candidate)
    trials.open("b" * 64)
    assert not list((tmp_path / FOLDER).iterdir())
