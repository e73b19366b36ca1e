"""The soft mask of PDP against an independent float64 computation, and its gradient against autograd."""

import math

import pytest
import torch

from hf_maskselect.methods.pdp_mask import soft_gradient_, soft_mask, soft_weight


class SoftWeight(torch.autograd.Function):
    """What the method does between the step's start and clipping, as one differentiable function."""

    @staticmethod
    def forward(ctx, weight, threshold, tau):
        ctx.save_for_backward(weight)
        ctx.constants = threshold, tau
        return soft_weight(weight, threshold, tau)

    @staticmethod
    def backward(ctx, grad):
        return soft_gradient_(grad.clone(), *ctx.saved_tensors, *ctx.constants), None, None


def test_values_equal_plain_arithmetic():
    generator = torch.Generator().manual_seed(0)
    weight, t, tau = 0.05 * torch.randn(200, generator=generator), 0.06, 1e-4
    for w, m, effective in zip(weight, soft_mask(weight.square(), t, tau), soft_weight(weight, t, tau), strict=True):
        z, k = math.exp(t**2 / tau), math.exp(float(w) ** 2 / tau)  # softmax over pruned and kept
        assert float(m) == pytest.approx(k / (z + k), rel=1e-4)
        assert float(effective) == pytest.approx(float(w) * k / (z + k), rel=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.06, torch.linspace(0, 0.1, 6, dtype=torch.float64)[:, None]])
def test_gradient_is_that_of_the_effective_weight(threshold):
    generator = torch.Generator().manual_seed(1)
    weight = 0.05 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    weight[0, 0] = 0.06  # on the boundary
    assert torch.autograd.gradcheck(
        lambda w: SoftWeight.apply(w, threshold, 1e-3), (weight.requires_grad_(),), eps=1e-7, atol=1e-6
    )
    m = torch.sigmoid((weight**2 - torch.as_tensor(threshold) ** 2) / 1e-3)
    formula = m + 2 * weight**2 / 1e-3 * m * (1 - m)
    found = soft_gradient_(torch.ones_like(weight), weight.detach(), threshold, 1e-3)
    torch.testing.assert_close(found, formula.detach())


def test_the_factor_at_the_boundary():
    factor = soft_gradient_(torch.ones(1), torch.tensor([0.069]), 0.069, 1e-4)
    assert float(factor) == pytest.approx(0.5 + 0.069**2 / 2e-4, rel=1e-5)  # 24.3


def test_far_from_the_boundary_the_mask_is_hard():
    weight = torch.tensor([0.0, 1e-3, 0.5, -3.0])
    assert soft_weight(weight, 0.1, 1e-6).tolist() == [0.0, 0.0, 0.5, -3.0]
    assert soft_gradient_(torch.ones(4), weight, 0.1, 1e-6).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_half_precision_weights_are_masked_in_float32():
    weight = (0.05 * torch.randn(1000, generator=torch.Generator().manual_seed(2))).bfloat16()
    found = soft_weight(weight, 0.06, 1e-4)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, soft_weight(weight.float(), 0.06, 1e-4).bfloat16())


@pytest.mark.parametrize("tau", [1e-3, torch.linspace(1e-3, 2e-3, 6, dtype=torch.float64)[:, None]])
@pytest.mark.parametrize("unit_axes", [(), (1,)])
def test_a_factor_is_in_the_mask_and_in_the_gradient(unit_axes, tau):
    generator = torch.Generator().manual_seed(3)
    weight = 0.05 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    factor, t = torch.rand(6, 8, generator=generator, dtype=torch.float64) + 0.5, 0.05

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            ctx.save_for_backward(weight)
            return soft_weight(weight, t, tau, unit_axes, factor)

        @staticmethod
        def backward(ctx, grad):
            return soft_gradient_(grad.clone(), *ctx.saved_tensors, t, tau, unit_axes, factor)

    squares = (factor * weight).square()
    if unit_axes:
        squares = squares.mean(1, keepdim=True).expand_as(weight)
    expected = weight * torch.sigmoid((squares - t**2) / torch.as_tensor(tau, dtype=torch.float64))
    torch.testing.assert_close(soft_weight(weight, t, tau, unit_axes, factor), expected, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(Scaled.apply, (weight.requires_grad_(),), eps=1e-7, atol=1e-6)


class SoftRows(SoftWeight):
    """The same for whole rows."""

    @staticmethod
    def forward(ctx, weight, threshold, tau):
        ctx.save_for_backward(weight)
        ctx.constants = threshold, tau, tuple(range(1, weight.dim()))
        return soft_weight(weight, *ctx.constants)

    @staticmethod
    def backward(ctx, grad):
        return soft_gradient_(grad.clone(), *ctx.saved_tensors, *ctx.constants), None, None


@pytest.mark.parametrize("shape", [(5, 8), (5, 2, 3, 3)])
def test_rows_share_one_mask_and_its_gradient(shape):
    weight = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    norms = weight.flatten(1).square().mean(1).sqrt()
    t, tau = float(norms.median()), 1e-3
    expected = weight * torch.sigmoid((norms**2 - t**2) / tau).view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(soft_weight(weight, t, tau, tuple(range(1, len(shape)))), expected)
    assert torch.autograd.gradcheck(
        lambda w: SoftRows.apply(w, t, tau), (weight.requires_grad_(),), eps=1e-7, atol=1e-6
    )


def test_no_effective_weight_is_subnormal():
    """They would be nothing but slow."""
    weight = torch.linspace(-0.2, 0.2, 40_001)
    for tau in (1e-5, 1e-4, 1e-3):
        found = soft_weight(weight, 0.117, tau)
        assert bool(((found == 0) | (found.abs() > torch.finfo(torch.float32).tiny)).all())
        grad = soft_gradient_(torch.full_like(weight, 1e-6), weight, 0.117, tau)
        assert bool(((grad == 0) | (grad.abs() > torch.finfo(torch.float32).tiny)).all())
