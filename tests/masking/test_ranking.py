"""The k largest of several tensors, against a stable sort in numpy."""

import numpy as np
import pytest
import torch

from hf_maskselect.masking.ranking import kth_largest, top_k_masks

INF = float("inf")
DATA = {
    "gaussian": lambda n, g: torch.randn(n, generator=g),
    "heavy ties": lambda n, g: torch.randint(0, 4, (n,), generator=g).float(),
    "constant": lambda n, g: torch.full((n,), 0.7),
    "heavy tails": lambda n, g: torch.exp(torch.randn(n, generator=g) * 10),
    "half dead": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.5, torch.randn(n, generator=g), -INF),
    "nearly all dead": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.001, torch.randn(n, generator=g), -INF),
    "votes": lambda n, g: (torch.randn(n, generator=g) * 9).round().clamp_(0, 20),
    "rising": lambda n, g: torch.arange(n).float(),
    "falling": lambda n, g: -torch.arange(n).float(),
    "one spike": lambda n, g: torch.zeros(n).scatter_(0, torch.tensor([n // 2]), 1.0),
}
SMALL_SHAPES = [[(1,)], [(7, 13), (1, 1), (5, 3)], [(64, 8)], [(3,), (17, 29), (2, 2, 5)]]
LARGE_SHAPES = [[(601, 499)], [(311, 401), (1, 1), (499, 251), (50_003,)]]  # far more than the 2^16 of the short path


def make(shapes, kind, seed=0):
    parts = [torch.Size(shape).numel() for shape in shapes]
    flat = DATA[kind](sum(parts), torch.Generator().manual_seed(seed))
    return [part.view(shape) for part, shape in zip(flat.split(parts), shapes, strict=True)]


def flatten(tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).numpy()


def check(tensors, ks):
    """Values and masks for every k; the oracle's order is by value, then by index."""
    flat = flatten(tensors)
    order = np.argsort(-flat, kind="stable")
    for k in ks:
        expected = np.zeros(len(flat), dtype=bool)
        expected[order[:k]] = True
        masks = top_k_masks(tensors, k)
        assert [mask.shape for mask in masks] == [t.shape for t in tensors]
        np.testing.assert_array_equal(flatten(masks), expected)
        if k:
            assert float(kth_largest(tensors, k)) == flat[order[k - 1]]


@pytest.mark.parametrize("kind", DATA)
def test_small_pools_for_many_k(kind):
    for seed, shapes in enumerate(SMALL_SHAPES):
        tensors = make(shapes, kind, seed)
        total = sum(t.numel() for t in tensors)
        check(tensors, sorted({0, 1, 2, total // 16, total // 2, total - 1, total} & set(range(total + 1))))


@pytest.mark.parametrize("kind", DATA)
def test_large_pools_for_many_k(kind):
    for seed, shapes in enumerate(LARGE_SHAPES):
        tensors = make(shapes, kind, seed)
        total = sum(t.numel() for t in tensors)
        check(tensors, [1, 2, total // 1000, total // 16, total // 2, total - 1, total])


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 2**17 + 1])
def test_sizes_around_the_change_of_algorithm(size):
    check(make([(size,)], "gaussian"), [1, size // 3, size])
    check(make([(size,)], "heavy ties"), [1, size // 3, size])


@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_data_that_misleads_every_strided_sample(shift):
    """Entries at the multiples of `period` are nothing like the rest, so a sample of that stride sees only them."""
    size = 150_000
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for period in range(2, 45):
        data = noise.clone()
        data[::period] += shift
        k = size // 2 if shift > 0 else size // 3
        assert float(kth_largest([data], k)) == np.partition(data.numpy(), size - k)[size - k], period


def test_neither_answer_changes_its_input():
    tensors = make(LARGE_SHAPES[1], "half dead")
    before = [t.clone() for t in tensors]
    top_k_masks(tensors, 1234)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("k", [0, 7])
def test_a_rank_outside_the_pool_is_refused(k):
    with pytest.raises(ValueError, match="1..6"):
        kth_largest([torch.zeros(2, 3)], k)
