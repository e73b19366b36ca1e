"""Code the positions of kept weights in few bits, as the gaps between them.

Gaps are Golomb-Rice coded: a gap g becomes its k low bits and g >> k in unary. Gaps of unstructured masks are
geometric, and their code is within a few percent of the entropy; any other mask of the same density costs at most half
a bit more per kept weight. The low bits are stored as k bit planes and the unary parts as one stream, so that coding
and decoding are operations on whole tensors.
"""

import math

import torch
from torch import Tensor

from ..masking.maskset import pack_bits, unpack_bits

LARGEST = 2**31 - 1  # most weights in one tensor: the limit of `torch.nonzero`


def gaps_of(positions: Tensor) -> Tensor:
    """Count the pruned weights before each kept one. positions: int64, increasing; returns int32 of that length."""
    gaps = positions.clone()
    gaps[1:] -= positions[:-1] + 1
    return gaps.int()


def rice_parameter(gaps: Tensor, total: int) -> tuple[int, int]:
    """Return (k, bits): the best number of low bits for these gaps, and the size of their code.

    The size is convex in k with its minimum near log2(ln 2 * mean gap), so only the neighbours of that are tried.
    """
    kept = gaps.numel()
    if kept == 0:
        return 0, 0
    likely = round(math.log2(max(1.0, math.log(2) * (total - kept) / kept)))
    sizes = {k: kept * (k + 1) + int((gaps >> k).sum()) for k in range(max(0, likely - 1), likely + 2)}
    best = min(sizes, key=sizes.__getitem__)
    return best, sizes[best]


def encode_gaps(gaps: Tensor, k: int) -> Tensor:
    """Return the code as uint8: k planes of low bits, each padded to a byte, then g >> k zeros and a one per gap."""
    if gaps.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    planes = [pack_bits((gaps & (1 << bit)) != 0) for bit in range(k)]
    ends = (gaps >> k).add_(1).cumsum(0).sub_(1)
    unary = torch.zeros(int(ends[-1]) + 1, dtype=torch.bool)
    unary[ends] = True
    return torch.cat([*planes, pack_bits(unary)])


def decode_gaps(coded: Tensor, k: int, kept: int, total: int) -> Tensor:
    """Return the positions (int64) of the `kept` weights among `total`; raises a ValueError for any other code."""
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
    """Return the fewest bits for a mask of which only the density is known: total * H(kept / total)."""
    if kept in (0, total):
        return 0.0
    density = kept / total
    return -total * (density * math.log2(density) + (1 - density) * math.log2(1 - density))
