"""Groups of weights along the input axis: their cut, their counts and their way along the ramp."""

import pytest
import torch

from hf_maskselect.masking.groups import Groups, group_boundaries


@pytest.mark.parametrize(("keep", "size"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (5, 7), (2, 32)])
def test_group_boundaries_are_the_neighbours_of_the_cut(keep, size):
    values = torch.randn(6, 7 * size, generator=torch.Generator().manual_seed(size)).abs()
    falls, stays = group_boundaries(values.view(6, 7, size), keep)
    ordered = values.view(6, 7, size).sort(dim=2).values
    assert torch.equal(falls, ordered[..., size - keep - 1]) and torch.equal(stays, ordered[..., size - keep])


@pytest.mark.parametrize("shape", [(6, 16), (6, 8, 3, 3)])
def test_a_mask_keeps_the_values_above_the_middle(shape):
    values, groups = torch.rand(shape, generator=torch.Generator().manual_seed(0)), Groups(2, 4)
    mask = groups.best(values)
    assert mask.is_contiguous() and torch.equal(groups.view(mask), groups.view(values) > groups.middle(values))
    assert not groups.exceeded(mask) and groups.short(mask) == 0
    assert Groups(1, 4).exceeded(mask) and Groups(3, 4).short(mask) == mask.numel() // 4


def test_groups_lose_whole_weights_along_the_ramp():
    shares = (0, 0.1, 0.3, 0.7, 1)
    assert [Groups(1, 4).after(share) for share in shares] == [None, None, Groups(3, 4), Groups(2, 4), Groups(1, 4)]
