"""The one-draw votes against the procedure of the paper: repeated draws without replacement."""

from functools import cache

import pytest
import torch

from hf_maskselect.masking.ranking import top_k_masks
from hf_maskselect.masking.votes import inclusion_rates, number_of_draws, rank_by_votes_, votes

MASKS = 24  # of each procedure; all bands below follow from the spread over them
BINS = torch.tensor([0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0])  # rank by magnitude, in units of k


def repeated_draws(scores, keep, draws, exponent, generator):
    """The oracle: `draws` times `keep` distinct positions, each drawn with p ~ score^exponent; counts per position."""
    p = scores.flatten().double().pow(exponent)
    counts = torch.zeros(scores.numel())
    for _ in range(draws):
        counts[torch.multinomial(p, keep, generator=generator)] += 1
    return counts.view(scores.shape)


def one_draw(scores, keep, draws, exponent, generator):
    return votes([scores], keep, draws, exponent, generator)[0]


def ranked(scores, keep, draws, exponent, generator):
    """What masks are made from: only doubtful entries are drawn."""
    return rank_by_votes_([scores.clone()], keep, draws, exponent, generator)[0]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def magnitudes(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed)).abs()


@cache
def statistics(procedure, sparsity, draws):
    """Per mask: share of entries that differ from plain top-k, and kept entries per bin of magnitude rank."""
    scores = magnitudes(192, 192)
    keep = int(scores.numel() * (1 - sparsity))
    plain = top_k_masks([scores], keep)[0]
    rank = scores.flatten().argsort(descending=True).argsort()
    bins = torch.bucketize(rank / keep, BINS, right=True)
    generator = seeded(1)
    differing, binned = [], []
    for _ in range(MASKS):
        mask = top_k_masks([procedure(scores, keep, draws, 5.0, generator)], keep)[0]
        differing.append((mask != plain).double().mean())
        binned.append(torch.bincount(bins[mask.flatten()], minlength=len(BINS) + 1).double())
    return torch.stack(differing), torch.stack(binned)


@pytest.mark.parametrize("procedure", [one_draw, ranked])
@pytest.mark.parametrize(("sparsity", "draws"), [(0.9375, 1), (0.9375, 20), (0.9375, 50), (0.54, 20), (0.99, 20)])
def test_the_law_of_the_masks_is_that_of_repeated_draws(procedure, sparsity, draws):
    ours, our_bins = statistics(procedure, sparsity, draws)
    theirs, their_bins = statistics(repeated_draws, sparsity, draws)
    error = ((ours.var() + theirs.var()) / MASKS).sqrt()
    # The shortcut is a large-n approximation; 2 % bounds its error on a large matrix, and what k = 368 adds.
    assert abs(ours.mean() - theirs.mean()) < 4 * error + 0.02 * theirs.mean()
    error = ((our_bins.var(0) + their_bins.var(0)) / MASKS).sqrt()
    difference = (our_bins.mean(0) - their_bins.mean(0)).abs()
    assert (difference < 4 * error + 0.5).all()  # half an entry: bins that are always full or always empty


@pytest.mark.parametrize("draws", [1, 3, 20, 200])
def test_ranks_are_votes_where_it_matters(draws):
    """Doubtful entries carry whole counts, hopeless and voteless ones less than one vote, certain ones all of them."""
    scores = [magnitudes(60, 50), magnitudes(70, 40, seed=1)]
    ranks = torch.cat([r.flatten() for r in rank_by_votes_([s.clone() for s in scores], 300, draws, 5.0, seeded(2))])
    rates = torch.cat([r.flatten() for r in inclusion_rates([s**5 / 1000 for s in scores], 300)])
    voted = ranks >= 1
    assert torch.equal(ranks[voted], ranks[voted].round()) and ranks.max() <= draws
    assert torch.equal(ranks[~voted].argsort(stable=True), rates[~voted].argsort(stable=True))
    assert (ranks[rates > 0.999] >= draws - 2).all()


def test_more_draws_approach_plain_top_k():
    scores = magnitudes(150, 150)
    plain = top_k_masks([scores], 2000)[0]
    share = {}
    for draws in (10, 1000, 100_000):
        masks = [top_k_masks([one_draw(scores, 2000, draws, 5.0, seeded(seed))], 2000)[0] for seed in range(4)]
        share[draws] = torch.stack([(mask != plain).double().mean() for mask in masks]).mean()
    assert share[1000] < share[10] / 5 and share[100_000] < share[1000] / 5  # falls like the root of the draws


def test_a_larger_exponent_is_closer_to_plain_top_k():
    scores = magnitudes(150, 150)
    plain = top_k_masks([scores], 2000)[0]
    masks = [top_k_masks([one_draw(scores, 2000, 20, e, seeded(0))], 2000)[0] for e in (1.0, 2.5, 5.0, 30.0)]
    shares = [float((mask != plain).double().mean()) for mask in masks]
    assert shares == sorted(shares, reverse=True) and shares[0] > 5 * shares[-1]


# -- counts -----------------------------------------------------------------------------------------------------------


def test_counts_are_whole_and_follow_the_inclusion_rates():
    scores = [magnitudes(60, 50), magnitudes(7, 11, seed=1)]
    keep, draws = 400, 1000
    counts = votes(scores, keep, draws, 5.0, seeded(0))
    assert [c.shape for c in counts] == [s.shape for s in scores]
    flat = torch.cat([c.flatten() for c in counts]).double()
    assert torch.equal(flat, flat.round()) and 0 <= flat.min() and flat.max() <= draws
    rates = torch.cat([r.flatten() for r in inclusion_rates([s**5 for s in scores], keep)]).double()
    for part in rates.argsort().chunk(10):  # from the hopeless to the certain
        expected, variance = draws * rates[part].sum(), (draws * rates[part] * (1 - rates[part])).sum()
        assert abs(flat[part].sum() - expected) < 5 * variance.sqrt() + 1


def test_a_zero_score_never_gets_a_vote():
    scores = magnitudes(100, 100)
    dead = torch.rand(100, 100, generator=seeded(1)) < 0.9
    counts = one_draw(scores.masked_fill(dead, 0), 600, 500, 5.0, seeded(0))
    assert counts[dead].count_nonzero() == 0 and counts[~dead].count_nonzero() > 600
    few = one_draw(scores.masked_fill(dead, 0), 5000, 7, 5.0, seeded(0))  # more places than weights left
    assert torch.equal(few, torch.where(dead, 0.0, 7.0))
    assert one_draw(torch.zeros(4, 4), 3, 5, 5.0, seeded(0)).count_nonzero() == 0


def test_votes_are_a_pure_function_of_scores_and_generator():
    scores = magnitudes(80, 80)
    before = scores.clone()
    state = torch.get_rng_state()
    first, again, other = (one_draw(scores, 500, 20, 5.0, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(scores, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one_draw(scores * 2.0**-40, 500, 20, 5.0, seeded(3)), first)  # only ratios of scores matter


# -- inclusion rates and draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("keep", [1, 300, 5000, 9999])
def test_inclusion_rates_sum_to_the_kept_count_and_rise_with_the_probability(tail, keep):
    p = (torch.randn(10_000, generator=seeded(0)) * tail).exp()
    (rates,) = inclusion_rates([p], keep)
    assert float(rates.sum(dtype=torch.float64)) == pytest.approx(keep, rel=1e-3)
    assert (rates[p.argsort()].diff() >= 0).all() and rates.min() >= 0 and rates.max() <= 1
    (scaled,) = inclusion_rates([p / 1024], keep)
    torch.testing.assert_close(scaled, rates, rtol=1e-3, atol=1e-6)
    parts = inclusion_rates([p[:16], p[16:].view(-1, 3)], keep)  # a pool is one list
    torch.testing.assert_close(torch.cat([part.flatten() for part in parts]), rates, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("factor", [0.1, 0.3, 3.0])
@pytest.mark.parametrize("keep", [0.01, 0.0625, 0.46])
def test_inclusion_rates_of_a_large_matrix_whose_columns_differ(factor, keep):
    """Every third column is of another scale: a sample taken with a stride of 3 sees nothing else."""
    scores = magnitudes(1024, 768)
    scores[:, ::3] *= factor
    keep = int(keep * scores.numel())
    (rates,) = inclusion_rates([scores**5], keep)
    assert float(rates.sum(dtype=torch.float64)) == pytest.approx(keep, rel=1e-3)


def test_number_of_draws_is_the_papers():
    square, wide = 768 * 768, 3072 * 768
    removed = {n: n - n // 16 for n in (square, wide)}  # 0.9375
    assert number_of_draws(removed[square], 5e-5) == 27
    assert number_of_draws(removed[square], 3e-4) == 165
    assert number_of_draws(removed[wide], 5e-5) == 110
    assert number_of_draws(removed[wide], 3e-4) == 663
    assert number_of_draws(1000, 5e-5) == 1  # at least one
    assert number_of_draws(12 * removed[square], 5e-5, matrices=12) == 27
