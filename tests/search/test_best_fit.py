"""What the fit of the best candidate so far leaves on disk, and that the run goes on from it."""

import math

import pytest
import torch
from tiny import make_trainer, same, weights_of

from hf_maskselect.search.weight_files import BestRefit, RefitErrors
from hf_maskselect.surgery.dense_outputs import dense_outputs
from hf_maskselect.surgery.refit import Refit


@pytest.mark.parametrize(
    ("scores", "kept"),
    [([3.0, 2.0, 2.0, 4.0], 1), ([math.nan, 5.0], 1), ([math.nan, math.nan], 0), ([-1.0, math.nan], 0)],
)
def test_the_best_so_far_is_kept(tmp_path, scores, kept):
    """Of equal ones the first, of diverged ones (NaN) as well."""
    best = BestRefit(tmp_path)
    assert best.find(0) is None
    fits = [Refit({"a.weight": 0.5}, {"a.weight": 0.25 / (1 + index)}) for index in range(len(scores))]
    for index, score in enumerate(scores):
        best.offer(index, score, fits[index], {"a.weight": torch.full((2, 3), float(index)).T})
    assert best.find(kept) == RefitErrors.of(fits[kept]) and best.find(1 - kept) is None
    assert torch.equal(best.load()["a.weight"], torch.full((3, 2), float(kept)))


def test_the_winner_is_not_fitted_twice(tmp_path, monkeypatch):
    """And where its fit is lost, as that of a killed search, a second one gives the same run at the same cost."""
    keywords = {"method": "random", "num_candidates": 3, "num_levels": 2, "refit_rows": 32, "trial_steps": 0}
    found = {}
    for name in ("kept", "lost"):
        trainer = make_trainer(tmp_path / name, **keywords)
        fits, refit = [], trainer.run.bench.refit

        def counted(*given, fits=fits, refit=refit):
            fits.append(refit(*given))
            return fits[-1]

        monkeypatch.setattr(trainer.run.bench, "refit", counted)
        if name == "lost":
            monkeypatch.setattr("hf_maskselect.search.weight_files.BestRefit.find", lambda *_: None)
        trainer.train()
        told = [(s.cut_error, s.refit_error, s.step_equivalents) for s in trainer.run.search.history]
        found[name] = weights_of(trainer.model), told, len(fits)
    candidates = sum(len(search.candidates) for search in trainer.run.search.history)
    assert (found["kept"][2], found["lost"][2]) == (candidates, candidates + 2) and candidates > 4
    assert same(found["kept"][0], found["lost"][0]) and found["kept"][1] == found["lost"][1]


def test_the_uncut_model_runs_once_a_level(tmp_path, monkeypatch):
    """For all its candidates; nothing of it stays, and each refit is what it would be alone."""
    keywords = {"method": "random", "num_candidates": 3, "num_levels": 2, "refit_rows": 32, "trial_steps": 0}
    found = {}
    for name in ("shared", "alone"):
        trainer = make_trainer(tmp_path / name, **keywords)
        bench, made, fits = trainer.run.bench, [], []
        refit = bench.refit

        def counted(*given, made=made, **named):
            made.append(dense_outputs(*given, **named))
            return made[-1]

        def refitted(*given, bench=bench, refit=refit, fits=fits, name=name):
            if name == "alone":
                bench._dense = None
            fits.append(refit(*given))
            return fits[-1]

        monkeypatch.setattr("hf_maskselect.search.bench.dense_outputs", counted)
        monkeypatch.setattr(bench, "refit", refitted)
        trainer.train()
        assert bench._dense is None and len(made) == (2 if name == "shared" else len(fits)) < len(fits) + 1
        found[name] = fits, weights_of(trainer.model)
    assert len(found["shared"][0]) > 4 and found["shared"][0] == found["alone"][0]
    assert same(found["shared"][1], found["alone"][1])
