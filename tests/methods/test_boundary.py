"""The boundary of a ranking: exact whatever the bracket, and cheap where values drift."""

import pytest
import torch

from hf_maskselect.methods import boundary as module
from hf_maskselect.methods.boundary import Boundary


def expected(values, below):
    ordered = values.flatten().sort().values
    return ordered[below - 1], ordered[below]


@pytest.mark.parametrize("size", [2, 7, 100, 70_000])
def test_every_call_is_exact_while_values_drift_and_the_rank_rises(size):
    generator = torch.Generator().manual_seed(size)
    values, boundary = torch.randn(size, generator=generator).abs(), Boundary()
    for step in range(12):
        below = min(max(1, (step + 1) * size // 13), size - 1)
        assert boundary.find(values, below) == expected(values, below)
        values = (values + 1e-3 * torch.randn(size, generator=generator)).abs()


@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.zeros(1000),
        lambda g: torch.randint(0, 3, (1000,), generator=g).float(),
        lambda g: torch.cat([torch.zeros(990), torch.rand(10, generator=g)]),
        lambda g: torch.full((1000,), float("inf")),
    ],
)
def test_ties_and_jumps_are_exact(make):
    generator, boundary = torch.Generator().manual_seed(0), Boundary()
    for below in (500, 501, 1, 999, 990, 991, 500):
        values = make(generator)
        assert boundary.find(values, below) == expected(values, below)
        values = 100 * torch.rand(1000, generator=generator)  # nothing is where it was
        assert boundary.find(values, below) == expected(values, below)


def test_a_slow_drift_needs_no_second_search(monkeypatch):
    searches = []
    search = module.kth_largest
    monkeypatch.setattr(module, "kth_largest", lambda *given: searches.append(1) or search(*given))
    generator, boundary = torch.Generator().manual_seed(0), Boundary()
    values = 0.04 * torch.randn(200_000, generator=generator).abs()
    for step in range(50):
        below = 150_000 + 500 * step  # a ramp of 400 steps
        assert boundary.find(values, below) == expected(values, below)
        values = (values + 2e-4 * torch.randn(200_000, generator=generator)).abs()
    assert len(searches) <= 8  # the first call, and the one that learns the pace of the ramp


@pytest.mark.parametrize("below", [0, 10, -1])
def test_a_rank_needs_a_value_on_each_side(below):
    with pytest.raises(ValueError, match=r"below must lie in 1\.\.9"):
        Boundary().find(torch.rand(10), below)
