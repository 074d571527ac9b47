"""The negative binomial against 60 digits of mpmath, where differences of logarithms of the gamma function lose them all."""

import itertools
from functools import cache

import mpmath
import pytest
import torch

from fastvae.distributions import NegativeBinomialLikelihood, ZeroInflatedNegativeBinomialLikelihood, _negative_binomial

COUNTS = (0, 1, 2, 3, 5, 9, 17, 100, 1000, 31_623, 99_999, 100_000)
MEANS = (1e-4, 1e-3, 0.02, 0.5, 1, 3.3, 9.7, 100, 997, 31_623, 99_700, 1e5)
DISPERSIONS = (1e-3, 1e-2, 0.1, 1, 2.5, 7.9, 8.1, 50, 1e3, 1e4, 1e5, 3e6, 1e7, 1e8)
ZERO_LOGITS = (-60.0, -3.0, 0.5, 25.0)
SMALL_GRID = (0, 1, 9, 1000, 100_000), (1e-4, 0.02, 3.3, 997, 1e5), (1e-3, 1, 50, 1e5, 1e8)


def grid(counts, means, dispersions):
    """Counts, log means and log dispersions in float32, each of shape (cases, 1)."""
    cases = torch.tensor(list(itertools.product(counts, means, dispersions)), dtype=torch.float64)
    x, mean, dispersion = cases.split(1, dim=1)
    return x.float(), mean.log().float(), dispersion.log().float()


@cache
def exact(x: float, log_mean: float, log_dispersion: float):
    """log p(x) and its derivatives with respect to both logarithms."""
    with mpmath.workdps(60):
        x, mean, dispersion = mpmath.mpf(x), mpmath.exp(log_mean), mpmath.exp(log_dispersion)
        value = mpmath.loggamma(x + dispersion) - mpmath.loggamma(dispersion) - mpmath.loggamma(x + 1)
        value += -dispersion * mpmath.log1p(mean / dispersion) - x * mpmath.log1p(dispersion / mean)
        slope = mpmath.psi(0, x + dispersion) - mpmath.psi(0, dispersion) - mpmath.log1p(mean / dispersion)
        grad_mean = dispersion * (x - mean) / (dispersion + mean)
        return value, grad_mean, dispersion * (slope + (mean - x) / (dispersion + mean))


@cache
def exact_zero_inflated(x: float, log_mean: float, zero_logit: float, log_dispersion: float):
    with mpmath.workdps(60):
        extra = 1 / (1 + mpmath.exp(-mpmath.mpf(zero_logit)))
        inner = mpmath.exp(exact(x, log_mean, log_dispersion)[0])
        return mpmath.log((extra if x == 0 else 0) + (1 - extra) * inner)


def relative_error(actual: float, expected) -> float:
    return float(abs((mpmath.mpf(actual) - expected) / expected))


def rows(*tensors):
    return zip(*(t.flatten().tolist() for t in tensors), strict=True)


def test_log_probabilities_of_float32_are_right_to_their_last_digit():
    x, log_mean, log_dispersion = grid(COUNTS, MEANS, DISPERSIONS)
    actual = NegativeBinomialLikelihood("per_element").log_prob(torch.cat([log_mean, log_dispersion], 1), x)
    assert actual.dtype == torch.float32
    assert actual.isfinite().all()
    errors = [relative_error(value, exact(*case)[0]) for value, *case in rows(actual, x, log_mean, log_dispersion)]
    assert max(errors) < 1e-7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_formula_alone_in_either_dtype(dtype, tolerance):
    """float32 is what a device without float64 computes in."""
    arguments = [t.to(dtype) for t in grid(COUNTS, MEANS, DISPERSIONS)]
    actual = _negative_binomial.log_prob(*arguments)
    errors = [relative_error(value, exact(*case)[0]) for value, *case in rows(actual, *arguments)]
    assert max(errors) < tolerance


def test_gradients_are_those_of_the_formula():
    x, log_mean, log_dispersion = grid(COUNTS, MEANS, DISPERSIONS)
    params = torch.cat([log_mean, log_dispersion], 1).requires_grad_()
    (grad,) = torch.autograd.grad(NegativeBinomialLikelihood("per_element").log_prob(params, x).sum(), params)
    for grad_mean, grad_dispersion, *case in rows(grad[:, 0], grad[:, 1], x, log_mean, log_dispersion):
        _, expected_mean, expected_dispersion = exact(*case)
        assert abs(grad_mean - expected_mean) <= 1e-6 * abs(expected_mean)
        # Where the two derivatives of Stirling's series cancel, the rounding of float64 remains.
        assert abs(grad_dispersion - expected_dispersion) <= 1e-6 * abs(expected_dispersion) + 1e-15


def test_zero_inflated_log_probabilities():
    x, log_mean, log_dispersion = grid(*SMALL_GRID)
    for logit in ZERO_LOGITS:
        params = torch.cat([log_mean, torch.full_like(log_mean, logit), log_dispersion], 1)
        actual = ZeroInflatedNegativeBinomialLikelihood("per_element").log_prob(params, x)
        for value, *case in rows(actual, x, *params.split(1, 1)):
            assert relative_error(value, exact_zero_inflated(*case)) < 1e-7


@pytest.mark.parametrize("make", [NegativeBinomialLikelihood, ZeroInflatedNegativeBinomialLikelihood])
def test_gradients_agree_with_differences(make):
    x, log_mean, log_dispersion = (t.double() for t in grid((0, 1, 4, 30), (0.02, 3.3, 50), (0.1, 8.0, 1e3)))
    parts = [log_mean, log_dispersion] if make is NegativeBinomialLikelihood else [log_mean, 0.3 - log_mean, log_dispersion]
    params = torch.cat(parts, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: make("per_element").log_prob(p, x), (params,))
    assert torch.autograd.gradgradcheck(lambda p: make("per_element").log_prob(p, x), (params,))


@pytest.mark.parametrize("zero_logit", [None, -200.0, -60.0, 2.0, 200.0])
@pytest.mark.parametrize(("log_mean", "log_dispersion"), [(-80.0, -40.0), (40.0, 3.0), (80.0, 80.0), (-50.0, 60.0), (5.0, 80.0)])
def test_extreme_parameters_are_finite(zero_logit, log_mean, log_dispersion):
    """Without a logit of zeros it is the negative binomial."""
    x = torch.tensor([[0.0], [1.0], [7.0], [1e6]])
    likelihood = NegativeBinomialLikelihood if zero_logit is None else ZeroInflatedNegativeBinomialLikelihood
    parts = [part for part in (log_mean, zero_logit, log_dispersion) if part is not None]
    params = torch.tensor([parts]).repeat(4, 1).requires_grad_()
    values = likelihood("per_element").log_prob(params, x)
    values.sum().backward()
    assert values.isfinite().all()
    assert params.grad.isfinite().all()
