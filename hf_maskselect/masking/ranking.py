"""The k largest entries of several tensors together: exact, ties by index, a few passes over memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Below this many entries one `kthvalue` is cheaper than bracketing.
_SMALL = 1 << 16
# The sample costs a sort, its coarseness a longer middle: a 32nd of the entries, within these bounds, is near the
# best.
_SAMPLE = (1 << 13, 1 << 17)


def kth_largest(tensors: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest value (k counts from 1) of all entries of `tensors` together, as a 0-dim tensor.

    A strided sample brackets the answer. One pass counts the entries above the bracket and collects those inside
    (about 2 % of all), and only these are searched. A bracket that misses is widened, so the answer is always exact.
    `tensors` must be of one dtype and device, without NaN.

    Raises:
        ValueError: k is out of range, or there is a NaN.
    """
    total = sum(t.numel() for t in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"k must lie in 1..{total} (the number of entries), got {k}")
    if total <= _SMALL:
        return torch.cat([t.flatten() for t in tensors]).kthvalue(total - k + 1).values  # NaN counts as largest
    flats = [t.flatten() for t in tensors]  # copies only of those that are not contiguous
    # An odd stride that is no multiple of 3 does not walk down single columns of the usual matrix widths.
    stride = max(1, total // min(max(total // 32, _SAMPLE[0]), _SAMPLE[1])) | 1
    stride += 2 if stride % 3 == 0 else 0
    sample = torch.cat([flat[::stride] for flat in flats]).sort(descending=True).values
    rank = k * sample.numel() / total
    margin = 4 * math.sqrt(sample.numel())
    while True:
        first, last = int(rank - margin), int(rank + margin)
        high = sample[first] if first >= 0 else sample.new_tensor(float("inf"))
        low = sample[last] if last < sample.numel() else sample.new_tensor(float("-inf"))
        above, inside = 0, []
        for flat in flats:
            over = flat > high
            above += int(torch.count_nonzero(over))
            inside.append(flat[over.logical_not_().logical_and_(flat >= low)])
        middle = torch.cat(inside)
        if 1 <= k - above <= middle.numel():
            return middle.kthvalue(middle.numel() - (k - above) + 1).values
        if first < 0 and last >= sample.numel():  # the bracket held everything that compares
            raise ValueError("NaN among the values to rank: check the weights and the criterion")
        margin *= 8


def top_k_masks(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Boolean masks of the k largest entries of all `tensors` together.

    Among equal values the lower index (earlier tensor, then lower flat position) is kept, so that exactly k entries
    are True on every machine. Positions count in row-major order, whatever the strides. The masks are contiguous.
    """
    tensors = [t.contiguous() for t in tensors]
    if k == 0:
        return [torch.zeros_like(t, dtype=torch.bool) for t in tensors]
    threshold = kth_largest(tensors, k)
    masks = [t > threshold for t in tensors]
    missing = k - sum(int(torch.count_nonzero(mask)) for mask in masks)
    for t, mask in zip(tensors, masks, strict=True):
        if missing == 0:
            break
        ties = (t == threshold).view(-1).nonzero().squeeze(1)[:missing]
        mask.view(-1)[ties] = True
        missing -= ties.numel()
    return masks
