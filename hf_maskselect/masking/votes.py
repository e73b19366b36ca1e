"""Mild randomness around any score: the vote counts of "Randomized Pruning Mask Generation and Selection".

The paper draws k entries without replacement from p_i ~ |w_i|^5, T times, counts how often each entry was drawn, and
keeps the k with most votes. T grows with the number of entries n, so that is O(n^2) work. Drawing without replacement
includes entry i with probability close to `pi_i = 1 - exp(-p_i * tau)`, with tau such that the pi sum to k. The T
draws are independent, so the counts are Binomial(T, pi_i): one draw per entry has the same law and costs O(n).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .ranking import kth_largest

SAMPLING_RATIOS = (5e-5, 1e-4, 8e-5, 3e-4)  # the paper's code rotates through these
_SOLVE_STEPS = 60
_NEWTON_STEPS = 40
_SMALL_POOL = 1 << 22


def number_of_draws(removed: int, ratio: float, matrices: int = 1) -> int:
    """T = max(int(removed * ratio), 1), the rule of the paper, for the average of several `matrices`."""
    return max(int(removed / matrices * ratio), 1)


def inclusion_rates(weights: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Rates pi_i = 1 - exp(-p_i * tau) with sum(pi) = keep, over the pool of all `weights` (p_i >= 0, float32).

    p need not be normalised. Entries of weight 0 have rate 0; if `keep` or fewer are positive, these have rate 1.
    """
    return _rates_([p.clone() for p in weights], keep)


def _rates_(weights: list[Tensor], keep: int) -> list[Tensor]:
    """`inclusion_rates` in place, without a second copy of the pool."""
    positive = sum(int(torch.count_nonzero(p)) for p in weights)
    if positive <= keep:
        return [p.copy_(p > 0) for p in weights]
    tau = _solve(_sampled(weights), keep / sum(p.numel() for p in weights))
    # Newton's method starts at the sample's answer; the sum is concave in tau, so one or two full passes are usual.
    for _ in range(_NEWTON_STEPS):
        total = slope = 0.0
        for p in weights:
            dropped = (p * -tau).exp_()
            total += dropped.numel() - float(dropped.sum(dtype=torch.float64))
            slope += float(dropped.mul_(p).sum(dtype=torch.float64))
        if abs(total - keep) <= 1e-4 * keep:
            break
        tau = max(tau + (keep - total) / slope, 0.1 * tau)
    return [p.mul_(-tau).expm1_().neg_() for p in weights]


def _sampled(weights: Sequence[Tensor], size: int = 1 << 14) -> Tensor:
    """About `size` entries, chosen by a multiplicative hash, since a stride would see only a few columns."""
    total = sum(p.numel() for p in weights)
    chosen = []
    for p in weights:
        count = -(-p.numel() * min(size, total) // total)
        spread = torch.arange(count, device=p.device) * 2654435761 % p.numel()
        chosen.append(p.reshape(-1)[spread])
    return torch.cat(chosen).double()


def _solve(p: Tensor, share: float) -> float:
    """Find tau with mean(1 - exp(-p tau)) = share, by bisection in log space (float64, on a sample)."""
    # The sample may have too few positive entries for this share; Newton's method needs only a finite start.
    share = min(share, 0.9 * float((p > 0).double().mean()))
    low, high = 1e-12, 1.0
    for _ in range(200):
        if float(-torch.expm1(-p * high).mean()) >= share:
            break
        low, high = high, high * 16
    for _ in range(_SOLVE_STEPS):
        middle = (low * high) ** 0.5
        if float(-torch.expm1(-p * middle).mean()) < share:
            low = middle
        else:
            high = middle
    return high


def votes(
    scores: Sequence[Tensor], keep: int, draws: int, exponent: float, generator: torch.Generator
) -> list[Tensor]:
    """Vote counts of `draws` draws of `keep` entries (T and k of the paper) from the pool of all `scores`.

    The scores are float32 and >= 0, with p_i ~ score_i^exponent; a zero score never gets a vote. Returns float32
    counts in 0..draws, shaped like the scores: a pure function of the state of the generator, which is on their
    device.
    """
    rates = _rates_(_powers_([s.clone() for s in scores], keep, exponent), keep)
    return [torch.binomial(torch.full_like(r, draws), r.clamp_(max=1.0), generator=generator) for r in rates]


def rank_by_votes_(
    scores: list[Tensor], keep: int, draws: int, exponent: float, generator: torch.Generator
) -> list[Tensor]:
    """Overwrite scores by values that rank entries as `votes` would, but faster: the `keep` largest are the mask.

    `torch.binomial` costs 100 ns an entry, so only entries whose place is in doubt are drawn. Let the last kept entry
    have about a votes. An entry that reaches 0.7 a with probability below 1e-15 gets no vote, and one that surely
    exceeds a gets all. If the threshold lies outside the assumed range (very few draws), all entries are drawn.
    Entries without a vote rank below all others, by their rate. They are needed only where the Binomial law, whose
    draws hold `keep` entries on average and not exactly, leaves too few entries with votes.
    """
    keep = max(keep, 1)  # a small matrix may keep nothing after rounding, and is ranked all the same
    rates = _rates_(_powers_(scores, keep, exponent), keep)
    # In a large pool the number of votes at the threshold hardly varies. A small one may leave the assumed range, and
    # all its entries are then drawn.
    spare = [rate.clone() for rate in rates] if sum(rate.numel() for rate in rates) <= _SMALL_POOL else None
    last = float(kth_largest(rates, keep)) * draws
    low, high = math.floor(0.7 * last), math.ceil(last + 0.3 * (draws - last))
    hopeless, certain = _surely_below(low, draws), 1 - _surely_below(draws - high, draws)
    for rate in rates:
        _draw_(rate, draws, hopeless, certain, generator)
    reach_low = sum(int(torch.count_nonzero(count >= max(low, 1))) for count in rates)
    exceed_high = sum(int(torch.count_nonzero(count > high)) for count in rates)
    if spare is not None and not exceed_high < keep <= reach_low:
        for rate, again in zip(rates, spare, strict=True):
            _draw_(rate.copy_(again), draws, 0.0, 2.0, generator)
    return rates


def _powers_(scores: list[Tensor], keep: int, exponent: float) -> list[Tensor]:
    """Overwrite scores by p = (score / keep-th largest score)^exponent.

    Float32 then resolves the scores around the threshold, however long their tail is. An entry whose p would overflow
    is always drawn, one whose p underflows never.
    """
    unit = float(kth_largest(scores, keep)) or max(float(s.max()) for s in scores)
    return [s.div_(unit).pow_(exponent).clamp_(max=1e12) for s in scores] if unit > 0 else scores


def _draw_(rate: Tensor, draws: int, hopeless: float, certain: float, generator: torch.Generator) -> None:
    """Overwrite rates by votes: all from `certain` on, a Binomial draw above `hopeless`, else none.

    An entry without a vote gets half its rate instead, which is below one vote.
    """
    flat = rate.view(-1)
    places = ((flat > hopeless) & (flat < certain)).nonzero().squeeze(1)
    p = flat[places].clamp_(max=1.0)
    counts = torch.binomial(torch.full_like(p, draws), p, generator=generator)
    counts = torch.where(counts > 0, counts, 0.5 * p)
    elected = flat >= certain
    flat.mul_(0.5).masked_fill_(elected, draws)
    flat[places] = counts


def _surely_below(count: int, draws: int, chance: float = 1e-15) -> float:
    """Largest rate (to 1e-6) at which Binomial(draws, rate) reaches `count` with less than `chance` (Chernoff)."""
    if count <= 0:
        return 0.0
    share, low, high = count / draws, 0.0, count / draws

    def log_bound(p: float) -> float:
        rest = (1 - share) * math.log((1 - share) / (1 - p)) if share < 1 else 0.0
        return -draws * (share * math.log(share / p) + rest)

    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if log_bound(middle) < math.log(chance) else (low, middle)
    return low
