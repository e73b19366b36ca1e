"""How the kept weights are shared among matrices."""

import torch

from hf_maskselect.masking.allocation import allocate


def test_allocation_fills_like_water():
    """Shares are proportional to size up to one level that all matrices have in common, capped, and sum exactly."""
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        sizes = torch.randint(1, 60, (int(torch.randint(1, 7, (), generator=g)),), generator=g).tolist()
        capacities = [int(torch.randint(0, size + 1, (), generator=g)) for size in sizes]
        keep = int(torch.randint(0, sum(capacities) + 1, (), generator=g))
        quotas = allocate(keep, sizes, capacities)
        assert sum(quotas) == keep
        low, high = 0.0, 1.0  # the level of the water, as a share of each size
        for _ in range(60):
            level = (low + high) / 2
            poured = sum(min(c, level * s) for s, c in zip(sizes, capacities, strict=True))
            low, high = (level, high) if poured < keep else (low, level)
        for quota, size, capacity in zip(quotas, sizes, capacities, strict=True):
            assert 0 <= quota <= capacity
            assert abs(quota - min(capacity, high * size)) < 1 + 1e-6
