"""Masks drawn from logits: the law of the sample, its gradient against autograd, and the budget's shift."""

import math

import pytest
import torch
from scipy import stats

from hf_maskselect.masking.groups import Groups
from hf_maskselect.methods.gumbel_sample import budget_shift, perturbed, sample


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("logit", [-6.0, -1.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_a_weight_is_kept_with_the_probability_of_its_logit(logit, tau):
    count = 200_000
    mask, _ = sample(perturbed(torch.full((count,), logit), generator()), tau)
    probability = 1 / (1 + math.exp(-logit))
    assert stats.binomtest(int(mask.sum()), count, probability).pvalue > 1e-4


def test_the_noise_is_logistic_and_keyed():
    noise = perturbed(torch.zeros(100_000), generator(3))
    assert stats.kstest(noise.double().numpy(), stats.logistic.cdf).pvalue > 1e-4
    assert torch.equal(noise, perturbed(torch.zeros(100_000), generator(3)))
    assert not torch.equal(noise, perturbed(torch.zeros(100_000), generator(4)))


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_the_slope_is_that_of_gumbel_softmax(tau):
    """Against two Gumbels and a softmax in float64: the same noise, its difference being the logistic one."""
    logits = torch.randn(500, generator=generator(1), dtype=torch.float64).requires_grad_()
    first, second = (-torch.rand(500, generator=generator(s), dtype=torch.float64).log().neg().log() for s in (2, 3))
    soft = torch.softmax((torch.stack([logits, torch.zeros_like(logits)]) + torch.stack([first, second])) / tau, 0)[0]
    (expected,) = torch.autograd.grad(soft.sum(), logits)
    mask, slope = sample((logits.detach() + first - second), tau)
    assert torch.equal(mask, soft > 0.5)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (5, 7)])
def test_groups_keep_their_best_perturbed_logits(n, m):
    drawn = perturbed(torch.zeros(6, 7 * m), generator(5))
    mask, slope = sample(drawn, 1.0, Groups(n, m))
    assert (mask.view(-1, m).sum(1) == n).all()
    kept, lost = (
        drawn.view(-1, m).masked_fill(~mask.view(-1, m), 99),
        drawn.view(-1, m).masked_fill(mask.view(-1, m), -99),
    )
    assert (kept.min(1).values > lost.max(1).values).all()
    middle = (kept.min(1).values + lost.max(1).values) / 2
    soft = torch.sigmoid(drawn.view(-1, m) - middle[:, None])
    torch.testing.assert_close(slope.view(-1, m), soft * (1 - soft))


@pytest.mark.parametrize("share", [0.999, 0.5, 0.0625, 0.001])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("start", [0.0, 50.0, -500.0])
def test_the_shift_meets_the_budget(share, spread, start):
    logits = [3 + spread * torch.randn(count, generator=generator(count)) for count in (3000, 50)]
    theta = budget_shift(logits, share * 3050, start)
    expected = sum(torch.sigmoid(t.double() - theta).sum() for t in logits)
    assert abs(float(expected) - share * 3050) <= max(1.1e-3 * min(share, 1 - share) * 3050, 0.51)


def test_a_shift_that_still_holds_is_kept():
    logits = [torch.randn(1000, generator=generator())]
    theta = budget_shift(logits, 100)
    assert budget_shift(logits, 100, theta) == theta


@pytest.mark.parametrize("keep", [0, 10, -1, 11])
def test_a_budget_lies_inside(keep):
    with pytest.raises(ValueError, match=r"keep must lie in \(0, 10\)"):
        budget_shift([torch.zeros(10)], keep)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_budget_is_not_sought_among_what_diverged(value):
    with pytest.raises(ValueError, match="NaN or infinity among the logits"):
        budget_shift([torch.zeros(8), torch.tensor([0.0, value])], 4)
