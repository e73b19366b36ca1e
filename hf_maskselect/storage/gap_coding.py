"""Where the kept weights of a tensor lie, in few bits: a bitmap, or the gaps between them.

Gaps are Golomb-Rice coded: a gap g is its k low bits and g >> k in unary. For masks without structure, whose gaps are
geometric, that is within a few percent of the entropy; for any other mask of the same density it costs at most half a
bit a kept weight more. Low bits lie in k bit planes and the unary parts in one stream, so that coding and decoding are
whole-tensor operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..masking.maskset import pack_bits, unpack_bits

LARGEST = 2**31 - 1  # weights of one tensor; `torch.nonzero` goes no further


def gaps_of(positions: Tensor) -> Tensor:
    """Pruned weights before each kept one. positions: int64, increasing; returns int32 of the same length."""
    gaps = positions.clone()
    gaps[1:] -= positions[:-1] + 1
    return gaps.int()


def rice_parameter(gaps: Tensor, total: int) -> tuple[int, int]:
    """(k, bits): the best number of low bits for these gaps, and what they then cost.

    The cost is convex in k with its minimum near log2(ln 2 * mean gap), so the neighbours of that are tried.
    """
    kept = gaps.numel()
    if kept == 0:
        return 0, 0
    likely = round(math.log2(max(1.0, math.log(2) * (total - kept) / kept)))
    costs = {k: kept * (k + 1) + int((gaps >> k).sum()) for k in range(max(0, likely - 1), likely + 2)}
    best = min(costs, key=costs.get)
    return best, costs[best]


def encode_gaps(gaps: Tensor, k: int) -> Tensor:
    """uint8: k planes of low bits, each padded to a byte, then the unary parts (g >> k zeros and a one)."""
    if gaps.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    planes = [pack_bits((gaps & (1 << bit)) != 0) for bit in range(k)]
    ends = (gaps >> k).add_(1).cumsum(0).sub_(1)
    unary = torch.zeros(int(ends[-1]) + 1, dtype=torch.bool)
    unary[ends] = True
    return torch.cat([*planes, pack_bits(unary)])


def decode_gaps(coded: Tensor, k: int, kept: int, total: int) -> Tensor:
    """The inverse: int64 positions of the `kept` weights among `total`.

    Raises:
        ValueError: the bytes are not the code of that many positions.
    """
    plane = (kept + 7) // 8
    if not 0 <= k < 32 or coded.numel() < k * plane:
        raise ValueError(f"{coded.numel()} bytes cannot hold {kept} gaps of {k} low bits")
    unary = coded[k * plane :]
    if unary.numel() * 8 > kept + (total >> k) + 7:
        raise ValueError(f"{coded.numel()} bytes are too many for {kept} gaps among {total} weights")
    ends = unpack_bits(unary, (unary.numel() * 8,)).nonzero().view(-1)
    if ends.numel() != kept:
        raise ValueError(f"the code holds {ends.numel()} positions, not {kept}")
    positions = gaps_of(ends).long() << k
    for bit in range(k):
        low = unpack_bits(coded[bit * plane : (bit + 1) * plane], (kept,))
        positions += low.long() << bit
    positions.add_(1).cumsum_(0).sub_(1)
    if kept and int(positions[-1]) >= total:
        raise ValueError(f"the code reaches position {int(positions[-1])} of {total}")
    return positions


def entropy_bits(kept: int, total: int) -> float:
    """What the mask of a tensor costs at least if only its density is known: total * H(kept / total) bits."""
    if kept in (0, total):
        return 0.0
    density = kept / total
    return -total * (density * math.log2(density) + (1 - density) * math.log2(1 - density))
