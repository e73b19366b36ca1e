import pytest
import torch

from hf_maskselect.surgery import least_squares
from hf_maskselect.surgery.least_squares import ridge, solve_masked


def problem(seed=0, rows=200, inputs=24, outputs=10):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ torch.randn(
        inputs, inputs, generator=generator, dtype=torch.float64
    )
    missing = torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    keep = (torch.rand(outputs, inputs, generator=generator) > 0.6).double()
    return x, missing, keep


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_solution_of_every_output_alone(monkeypatch, seed):
    monkeypatch.setattr(least_squares, "ITERATIONS", 100)
    monkeypatch.setattr(least_squares, "LEAST_GAIN", 0.0)
    x, missing, keep = problem(seed)
    gram, cross = x.T @ x, missing.T @ x
    delta = solve_masked(gram, cross, keep)
    assert torch.equal(delta * (1 - keep), torch.zeros_like(delta))
    for row, kept in zip(range(len(keep)), keep.bool(), strict=True):
        system = gram[kept][:, kept] + ridge(gram) * torch.eye(int(kept.sum()), dtype=torch.float64)
        assert torch.allclose(delta[row, kept], torch.linalg.solve(system, cross[row, kept]), atol=1e-9)


def test_few_iterations_are_close_to_many(monkeypatch):
    x, missing, keep = problem(rows=2000, inputs=64)
    gram, cross = x.T @ x, missing.T @ x
    few = solve_masked(gram, cross, keep)
    monkeypatch.setattr(least_squares, "ITERATIONS", 200)
    monkeypatch.setattr(least_squares, "LEAST_GAIN", 0.0)
    many = solve_masked(gram, cross, keep)

    def error(delta):
        return (missing - x @ delta.T).square().sum()

    assert error(few) <= 1.01 * error(many) < error(torch.zeros_like(few))


def test_inputs_that_hardly_vary_get_no_large_weights():
    """And one large input does not hold the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=generator, dtype=torch.float64)
    missing = x @ torch.randn(32, 8, generator=generator, dtype=torch.float64)
    missing += torch.randn(500, 8, generator=generator, dtype=torch.float64)
    x[:, 0] *= 1e-4
    x[:, 1] *= 100
    delta = solve_masked(x.T @ x, missing.T @ x, torch.ones(8, 32, dtype=torch.float64))
    assert delta[:, 0].abs().max() < 0.1
    left = (missing - x @ delta.T)[:, :].var(0).mean() - 1
    assert left < 0.25 * (missing.var(0).mean() - 1)


def test_nothing_to_fit_changes_nothing():
    x, missing, keep = problem()
    x[:, 0] = 0  # an input that never varies
    keep[1] = 0  # an output that keeps nothing
    delta = solve_masked(x.T @ x, missing.T @ x, keep)
    assert torch.isfinite(delta).all()
    assert not delta[:, 0].any() and not delta[1].any()
    assert not solve_masked(x.T @ x, torch.zeros_like(delta), keep).any()
    assert not solve_masked(torch.zeros(24, 24).double(), torch.zeros_like(delta), keep).any()
