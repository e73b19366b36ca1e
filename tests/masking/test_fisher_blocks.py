"""The inverse Fisher information in blocks, against the plain formula in float64."""

import pytest
import torch
from test_scores import batches, collect
from tiny import make
from torch.testing import assert_close

from hf_maskselect import prunable_weights
from hf_maskselect.masking.fisher_blocks import BLOCK, bytes_of, chunks_of, inverse_diagonal, shortened
from hf_maskselect.masking.scores import CRITERIA, GradientStats


def by_rank_one(gradients, damping):
    """The inverse of `damping I + 1/m sum g g^T` by the recursion of the paper, one gradient after the other."""
    inverse = torch.eye(gradients.shape[1], dtype=torch.float64) / damping
    for grad in gradients:
        projected = inverse @ grad
        inverse = inverse - torch.outer(projected, projected) / (len(gradients) + grad @ projected)
    return inverse.diagonal()


def slow(gradients, damping):
    """`inverse_diagonal` row by row and block by block; `gradients` of shape (samples, rows, ...)."""
    flat = gradients.double().flatten(2)
    damping = damping * float(flat.square().mean())
    expected = torch.empty_like(flat[0])
    for row in range(flat.shape[1]):
        for first in range(0, flat.shape[2], BLOCK):
            block = slice(first, first + BLOCK)
            expected[row, block] = by_rank_one(flat[:, row, block], damping)
    return expected.view(gradients.shape[1:])


@pytest.mark.parametrize("shape", [(3, 130), (4, 50), (2, 7), (3, 20, 3, 3)], ids=str)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_the_diagonal_is_that_of_every_block_of_a_row(shape, damping):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    mixed = torch.randn(12, 5, generator=generator) @ torch.randn(5, weight.numel(), generator=generator)
    gradients = (mixed.view(12, *shape) * 1e-4).bfloat16()  # of low rank, so that neighbours make up for each other
    found = inverse_diagonal([grad.flatten(1) for grad in gradients], weight, 12, damping)
    assert found.dtype == torch.float32 and found.shape == weight.shape
    assert_close(found.double(), slow(gradients, damping), rtol=1e-4, atol=0)


def test_many_rows_are_inverted_in_slabs_of_the_same_numbers(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, gradients = torch.randn(9, 60, generator=generator), torch.randn(4, 9, 60, generator=generator)
    whole = inverse_diagonal(list(gradients), weight, 4, 0.1)
    monkeypatch.setattr("hf_maskselect.masking.fisher_blocks._ENTRIES", 2 * 60 * BLOCK)
    assert_close(inverse_diagonal(list(gradients), weight, 4, 0.1), whole, rtol=1e-6, atol=0)


def test_weights_without_gradients_matter_least():
    weight = torch.randn(2, 60)
    for gradients in ([], [torch.zeros(2, 60, dtype=torch.bfloat16)] * 3):
        assert bool(inverse_diagonal(gradients, weight, 3, 0.1).isinf().all())
    gradients = [torch.randn(2, 60) for _ in range(3)]
    gradients[1][1, 55] = float("nan")
    assert bool(inverse_diagonal(gradients, weight, 3, 0.1).isnan().any())  # `checked_score` refuses it by name


def test_pruned_weights_leave_the_blocks():
    """The others cannot make up for anything through a weight that is gone."""
    generator = torch.Generator().manual_seed(0)
    weight, gradients = torch.randn(2, 50, generator=generator), torch.randn(6, 2, 50, generator=generator)
    weight[:, ::2] = 0
    held = [shortened(grad, weight) for grad in gradients]
    damping = 0.1 * float(torch.stack(held).double().square().mean())
    found = inverse_diagonal(held, weight, 6, 0.1)
    for row in range(2):
        kept = torch.stack(held).double()[:, row, 1::2]
        assert_close(found[row, 1::2].double(), by_rank_one(kept, damping), rtol=1e-4, atol=0)


def test_chunks_hold_what_fits_but_at_least_one_matrix():
    sizes = [10, 20, 5, 40, 1]
    assert chunks_of(sizes, 3, 6 * 30) == [[0, 1], [2], [3], [4]]
    assert chunks_of(sizes, 3, 1) == [[0], [1], [2], [3], [4]]
    assert chunks_of(sizes, 3, 6 * 76) == [[0, 1, 2, 3, 4]] and bytes_of(sizes, 3) == 6 * 76


def sampled(model, weights, needs, memory, damping=0.1):
    with GradientStats(model, weights, needs, damping, memory) as stats:
        for _ in stats.passes(4):
            held = bytes_of([weights[name].numel() for name in stats._held], 4)
            assert held <= max(memory, *(bytes_of([w.numel()], 4) for w in weights.values()))
            for batch in batches():
                stats.sample(model(**batch).loss)
            assert stats._samples == 4
    return stats


@pytest.mark.parametrize("family", ["Bert", "Albert"])
def test_the_statistic_of_a_model_is_that_of_its_gradients_whatever_the_memory(family):
    """Beside others too: these are taken in the first pass alone."""
    model = make(family, num_labels=2)
    weights = prunable_weights(model)
    gradients = {name: [] for name in weights}
    for batch in batches():
        grads = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            gradients[name].append(shortened(grad, weight))
    plenty = sampled(model, weights, {"inverse"}, 1e9)
    assert plenty.rounds == 1
    some = sampled(model, weights, {"inverse", "product", "uncertainty", "sensitivity"}, 5e4)
    little = sampled(model, weights, {"inverse"}, 1)
    assert little.rounds == len(weights) > some.rounds > 1
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, weight in weights.items():
        exact = slow(torch.stack(gradients[name]).view(4, *weight.shape), 0.1)
        found = plenty.of(name)
        assert found.samples == 4 and found.square is None
        assert_close(found.inverse.double(), exact, rtol=1e-3, atol=0)
        assert torch.equal(some.of(name).inverse, found.inverse) and torch.equal(
            little.of(name).inverse, found.inverse
        )
        score = CRITERIA["obert"].score(name, weight, found)
        assert_close(score.double(), weight.detach().double() ** 2 / (2 * exact), rtol=1e-3, atol=0)
    product = collect(model, weights, {"product"})
    assert all(torch.equal(some.of(name).product, product.of(name).product) for name in weights)
