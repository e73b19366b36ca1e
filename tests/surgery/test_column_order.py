"""The search for an order of columns: never worse, deterministic, inside its blocks, as good as trying them all."""

from itertools import permutations

import pytest
import torch

from hf_maskselect.surgery.column_order import kept_magnitude, partitions, search_permutation


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8)])
def test_kept_magnitude_is_that_of_the_best_of_each_group(n, m):
    weight = torch.randn(7, 5 * m)
    expected = weight.abs().unflatten(1, (-1, m)).topk(n, dim=2).values.sum()
    assert kept_magnitude(weight, n, m) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "columns", "block"), [(2, 4, 64, None), (2, 4, 48, 12), (1, 4, 32, 8), (4, 8, 64, 32)]
)
def test_an_order_is_never_worse_and_stays_in_its_blocks(n, m, columns, block):
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(1))
    order = search_permutation(weight, n, m, block, rounds=30)
    assert torch.equal(order, search_permutation(weight, n, m, block, rounds=30))
    assert sorted(order.tolist()) == list(range(columns))
    block = block or columns
    assert torch.equal(order // block, torch.arange(columns) // block)
    assert kept_magnitude(weight[:, order], n, m) > kept_magnitude(weight, n, m)


def test_two_groups_get_the_best_of_all_orders():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    order = search_permutation(weight, 2, 4)
    best = max(kept_magnitude(weight[:, list(way)], 2, 4) for way in permutations(range(8)) if way[0] == 0)
    assert kept_magnitude(weight[:, order], 2, 4) == pytest.approx(best)


def test_what_holds_the_pattern_or_has_no_choice_stays_as_it_is():
    weight = torch.zeros(16, 32)
    weight[:, ::4] = weight[:, 1::4] = 1
    assert torch.equal(search_permutation(weight, 2, 4), torch.arange(32))
    assert torch.equal(search_permutation(torch.randn(4, 4), 2, 4), torch.arange(4))
    assert torch.equal(search_permutation(torch.ones(4, 16), 2, 4), torch.arange(16))


def test_there_are_35_ways_to_deal_two_groups_of_four():
    ways = partitions(4)
    assert len(ways) == 35 and ways[0] == tuple(range(8))
    assert len({frozenset([frozenset(way[:4]), frozenset(way[4:])]) for way in ways}) == 35
    assert len(partitions(8)) == 65 and all(sorted(way) == list(range(16)) for way in partitions(8))


@pytest.mark.parametrize(("columns", "block"), [(30, None), (32, 6), (32, 12)])
def test_columns_that_cannot_be_grouped_are_refused(columns, block):
    with pytest.raises(ValueError, match="cannot be grouped by 4"):
        search_permutation(torch.randn(4, columns), 2, 4, block)
