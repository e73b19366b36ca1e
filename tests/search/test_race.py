"""The race is a pure function of the scores."""

import math

import pytest

from hf_maskselect.search.race import race
from hf_maskselect.search.results import Candidate


def run(rungs, *scores):
    """A race in which candidate i has `scores[i][r]` in rung r; returns the winner, all candidates, and what was
    tried."""
    candidates = [Candidate(index, f"p{index}", None, 1.0, str(index)) for index in range(len(scores))]
    tried = []

    def score_all(racing, steps):
        tried.append(([candidate.index for candidate in racing], steps))
        return {candidate.index: scores[candidate.index][len(tried) - 1] for candidate in racing}

    return race(candidates, rungs, score_all).index, candidates, tried


def test_the_better_half_goes_on_and_the_last_score_decides():
    winner, candidates, tried = run([(4, 10), (2, 20)], (0.5, 0.4), (0.1, 0.3), (0.9, 0.0), (0.8, 0.0))
    assert winner == 1 and tried == [([0, 1, 2, 3], 10), ([0, 1], 20)]
    assert [candidate.scores for candidate in candidates] == [[0.5, 0.4], [0.1, 0.3], [0.9], [0.8]]
    assert [candidate.steps for candidate in candidates] == [30, 30, 10, 10]


def test_candidate_0_is_in_every_rung():
    assert run([(3, 1), (2, 2)], (0.9, 0.9), (0.2, 0.1), (0.1, 0.2))[2] == [([0, 1, 2], 1), ([0, 2], 2)]


@pytest.mark.parametrize(
    ("scores", "winner"),
    [([0.5, 0.5], 0), ([math.nan, 0.5], 1), ([math.nan, math.nan], 0), ([math.inf, math.nan], 0)],
)
def test_ties_go_to_the_lower_index_and_diverged_trials_are_last(scores, winner):
    assert run([(2, 1)], *([score] for score in scores))[0] == winner


def test_fewer_candidates_than_planned_all_go_on():
    assert run([(4, 1), (2, 1)], (0.1, 0.2), (0.2, 0.1))[0] == 1
