"""Gap codes: round trips, sizes near the entropy, refusals."""

import pytest
import torch

from hf_maskselect.storage.gap_coding import decode_gaps, encode_gaps, entropy_bits, gaps_of, rice_parameter

DENSITIES = [0.001, 0.01, 0.0625, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0]


def coded(mask):
    positions = mask.nonzero().view(-1)
    gaps = gaps_of(positions)
    k, bits = rice_parameter(gaps, mask.numel())
    return positions, gaps, k, bits, encode_gaps(gaps, k)


def random_mask(total, density, seed=0):
    return torch.rand(total, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("total", [1, 7, 8, 9, 1000, 100_003])
def test_positions_come_back(total, density):
    mask = random_mask(total, density)
    positions, gaps, k, bits, code = coded(mask)
    assert code.dtype == torch.uint8
    assert torch.equal(decode_gaps(code, k, positions.numel(), total), positions)
    # each of the k + 1 streams is padded to a byte
    assert bits <= code.numel() * 8 < bits + 8 * (k + 1)


@pytest.mark.parametrize("where", [[], [0], [99], [0, 99], [0, 1, 2], [97, 98, 99], list(range(100))])
def test_masks_at_the_edges_come_back(where):
    mask = torch.zeros(100, dtype=torch.bool)
    mask[where] = True
    positions, _, k, _, code = coded(mask)
    assert decode_gaps(code, k, len(where), 100).tolist() == where == positions.tolist()


@pytest.mark.parametrize("density", [0.001, 0.01, 0.0625, 0.1, 0.2, 0.3])
def test_a_random_mask_costs_little_more_than_its_entropy(density):
    mask = random_mask(1_000_000, density)
    bits = coded(mask)[3]
    assert 1 <= bits / entropy_bits(int(mask.sum()), mask.numel()) < 1.035


@pytest.mark.parametrize("density", [0.001, 0.03, 0.2, 0.45])
def test_the_chosen_parameter_is_the_best_of_all(density):
    _, gaps, k, bits, _ = coded(random_mask(20_000, density))
    costs = [gaps.numel() * (j + 1) + int((gaps >> j).sum()) for j in range(20)]
    assert bits == costs[k] == min(costs)


def test_a_mask_with_structure_costs_at_most_half_a_bit_more_a_weight():
    """Gaps that are not geometric: rows that are dense, rows that are empty."""
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[::16] = True
    kept = int(mask.sum())
    assert coded(mask.view(-1))[3] <= entropy_bits(kept, mask.numel()) + 0.5 * kept


def test_the_entropy_of_a_mask():
    assert entropy_bits(0, 10) == entropy_bits(10, 10) == 0
    assert entropy_bits(5, 10) == pytest.approx(10)
    assert entropy_bits(1, 16) == pytest.approx(16 * 0.3373, rel=1e-3)


@pytest.mark.parametrize("change", ["short", "empty", "k", "more", "fewer", "total"])
def test_bytes_that_are_no_such_code_are_refused(change):
    positions, _, k, _, code = coded(random_mask(1000, 0.1))
    kept, total = positions.numel(), 1000
    given = {
        "short": (code[:-1], k, kept, total),
        "empty": (code[:0], k, kept, total),
        "k": (code, 40, kept, total),
        "more": (code, k, kept + 8, total),
        "fewer": (code, k, kept - 1, total),
        "total": (code, k, kept, int(positions[-1])),
    }
    with pytest.raises(ValueError, match="hold|reaches"):
        decode_gaps(*given[change])
