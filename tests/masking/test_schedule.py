"""Levels and their steps."""

import itertools

import pytest

from hf_maskselect.masking.schedule import LevelPlan, check_levels, cubic_levels


def test_the_levels_of_the_paper():
    assert cubic_levels(0.9375, 4) == pytest.approx([0.542, 0.820, 0.923, 0.9375], abs=6e-4)
    eight = [0.327, 0.572, 0.748, 0.866, 0.938, 0.975, 0.988, 0.99]
    assert cubic_levels(0.99, 8) == pytest.approx(eight, abs=6e-4)


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.7, 0.9375, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 20])
def test_cubic_levels_pass_their_own_check(sparsity, count):
    levels = cubic_levels(sparsity, count)
    check_levels(levels, sparsity)
    cuts = [b - a for a, b in itertools.pairwise([0.0, *levels])]
    assert len(levels) == count and cuts == sorted(cuts, reverse=True)


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        ([], "empty"),
        ([0.5, 0.5, 0.9], "increasing"),
        ([0.8, 0.5, 0.9], "increasing"),
        ([0.0, 0.9], r"inside \(0, 1\)"),
        ([-0.1, 0.9], r"inside \(0, 1\)"),
        ([0.9, 1.0], r"inside \(0, 1\)"),
        ([0.5, float("nan"), 0.9], r"inside \(0, 1\)"),
        ([0.5, 0.8], "0.8.*sparsity=0.9"),
    ],
)
def test_levels_that_make_no_sense_are_refused(levels, reason):
    with pytest.raises(ValueError, match=f"levels.*{reason}"):
        check_levels(levels, 0.9)


def plan(count, max_steps, warmup=0, last_weight=2.0):
    return LevelPlan.build(cubic_levels(0.9375, count), max_steps, warmup, last_weight)


@pytest.mark.parametrize("last_weight", [0.1, 1.0, 2.0, 50.0])
def test_every_step_belongs_to_one_level_and_every_level_has_steps(last_weight):
    for count, warmup, room in itertools.product(range(1, 7), (0, 1, 5), (0, 1, 2, 7, 50)):
        max_steps = warmup + count + room
        made = plan(count, max_steps, warmup, last_weight)
        spans = [made.span(level) for level in range(-1, count)]
        assert spans[0] == (0, warmup) and spans[-1][1] == max_steps
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        assert all(first < last for first, last in spans[1:])
        lengths = [made.length(level) for level in range(-1, count)]
        assert lengths == [last - first for first, last in spans] and sum(lengths) == max_steps
        owner = [level for level, length in zip(range(-1, count), lengths, strict=True) for _ in range(length)]
        assert [made.level_at(step) for step in range(max_steps)] == owner


@pytest.mark.parametrize("count", [2, 4, 7])
@pytest.mark.parametrize("weight", [1.0, 2.0, 3.5])
def test_the_last_level_has_its_weight_and_the_others_are_even(count, weight):
    made = plan(count, 5003, warmup=3, last_weight=weight)
    *others, last = [made.length(level) for level in range(count)]
    unit = 5000 / (count - 1 + weight)
    assert all(abs(length - unit) <= 1 for length in others)
    assert abs(last - weight * unit) <= 1


@pytest.mark.parametrize(("count", "max_steps", "warmup"), [(4, 3, 0), (4, 13, 10), (1, 0, 0), (1, 5, 5)])
def test_a_run_too_short_for_its_levels_is_refused(count, max_steps, warmup):
    with pytest.raises(ValueError, match=f"0.9375.*{count} levels.*{max_steps} optimizer steps.*raise max_steps"):
        plan(count, max_steps, warmup)
