"""Weights of which whole 1x4 blocks are zero, and exports of them that take no time."""

import torch
from tiny import make

from hf_maskselect.runtime.model import linear_names


def blocks(out, inp, sparsity, seed=0):
    """A random matrix of which only the largest 1x4 blocks are kept."""
    weight = torch.randn(out, inp, generator=torch.Generator().manual_seed(seed))
    sums = weight.abs().view(out, -1, 4).sum(-1)
    return weight * (sums >= sums.flatten().quantile(sparsity)).repeat_interleave(4, 1)


def sparse_model(family="Bert", sparsity=0.8, **changes):
    """A tiny model in eval mode of which only the largest 1x4 blocks are kept."""
    model = make(family, **changes).eval()
    for seed, name in enumerate(linear_names(model)):
        linear = model.get_submodule(name)
        linear.weight.data = blocks(*linear.weight.shape, sparsity, seed) * 0.1
    return model


def time_quickly(patch):
    """Let exports spend hardly any time on their timings. patch: a MonkeyPatch."""
    patch.setattr("hf_maskselect.runtime.export._SECONDS", 0.01)
    patch.setattr("hf_maskselect.runtime.choose._SECONDS", 0.001)
