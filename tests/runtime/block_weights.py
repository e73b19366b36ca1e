"""Weights of which whole 1x4 blocks are zero."""

import torch


def blocks(out, inp, sparsity, seed=0):
    """A random matrix of which only the largest 1x4 blocks are kept."""
    weight = torch.randn(out, inp, generator=torch.Generator().manual_seed(seed))
    sums = weight.abs().view(out, -1, 4).sum(-1)
    return weight * (sums >= sums.flatten().quantile(sparsity)).repeat_interleave(4, 1)
