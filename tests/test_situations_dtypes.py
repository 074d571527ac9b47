"""Data that comes in another dtype than the network's output: what torch's losses take, ours take."""

import itertools

import numpy
import pytest
import torch
import torch.nn.functional as F
from _helpers import TOLERANCES, Source, each_place, leaf

import fastvae
from fastvae import functional as FV

OPERATOR = "reconstruction_forward"
FLOATS = tuple(TOLERANCES)


def torch_mse_loss(input, target, reduction="mean"):
    """torch's loss of the dtype that both promote to: releases up to 2.11 cannot differentiate a promotion inside."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    return F.mse_loss(input.to(dtype), target.to(dtype), reduction=reduction)


LOSSES = {
    "binary_cross_entropy_with_logits": (FV.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
    "mse_loss": (FV.mse_loss, torch_mse_loss),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)
# A forced backend has to serve float64, to which these promote.
each_place_of_float64 = each_place(OPERATOR, dtype=torch.float64)


def assert_as_torch(ours, expected, x, twin) -> None:
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


@each_place_of_float64
@each_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_numpy_data_beside_the_logits_of_a_network(place, loss, reduction):
    """NumPy makes float64, and torch then computes in float64; the gradient is in the dtype of the logits."""
    ours, theirs = LOSSES[loss]
    target = torch.from_numpy(numpy.random.default_rng(0).random((6, 5))).to(place.device)
    x = leaf(Source(place.device).normal(6, 5))
    twin = leaf(x)
    result = ours(x, target, reduction=reduction)
    assert result.dtype == torch.float64
    assert_as_torch(result, theirs(twin, target, reduction=reduction), x, twin)


@each_place_of_float64
@each_loss
@pytest.mark.parametrize(("dtype", "target_dtype"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_every_pair_of_dtypes_that_torch_takes(place, loss, dtype, target_dtype):
    """Elementwise losses have the dtype that input and target promote to, reduced ones at least float32."""
    ours, theirs = LOSSES[loss]
    source = Source(place.device, dtype)
    x, target = leaf(source.normal(6, 5)), source.uniform(6, 5, dtype=target_dtype)
    promoted = torch.promote_types(dtype, target_dtype)
    elementwise, mean = ours(x, target, reduction="none"), ours(x, target)
    assert elementwise.dtype == promoted
    assert mean.dtype == torch.promote_types(promoted, torch.float32)
    expected = theirs(x.double(), target.double(), reduction="none")
    torch.testing.assert_close(elementwise.double(), expected, rtol=2 * TOLERANCES[promoted]["rtol"], atol=2e-6)
    mean.backward()
    assert x.grad.dtype == dtype


@each_place_of_float64
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_squared_error_takes_integers_as_numbers(place, dtype, reduction):
    x = leaf(Source(place.device).normal(6, 5))
    twin, target = leaf(x), torch.arange(30, device=place.device).view(6, 5).to(dtype)
    assert_as_torch(FV.mse_loss(x, target, reduction=reduction), torch_mse_loss(twin, target, reduction=reduction), x, twin)


@each_place_of_float64
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, *FLOATS], ids=str)
def test_a_weight_of_any_dtype_leaves_the_dtype_of_the_loss(place, dtype):
    """Masks too."""
    source = Source(place.device)
    weight, target = (source.uniform(6, 5) * 3).to(dtype), source.uniform(6, 5)
    # torch cannot subtract 1 from a bool, and wraps around where it subtracts 1 from a 0 in uint8.
    number = weight.float() if dtype in (torch.bool, torch.uint8) else weight
    for ours, theirs, kwargs in (
        (FV.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, {"weight": weight}),
        (FV.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, {"pos_weight": number}),
        (FV.binary_cross_entropy, F.binary_cross_entropy, {"weight": weight}),
    ):
        x = leaf(source.uniform(6, 5))
        twin = leaf(x)
        assert_as_torch(ours(x, target, **kwargs), theirs(twin, target, **kwargs), x, twin)


@each_place_of_float64
def test_probabilities_beside_float64_data(place):
    """torch refuses it; here every loss promotes alike."""
    source = Source(place.device)
    x, target = leaf(source.uniform(6, 5)), source.uniform(6, 5, dtype=torch.float64)
    twin = leaf(x)
    assert_as_torch(FV.binary_cross_entropy(x, target), F.binary_cross_entropy(twin.double(), target), x, twin)
    x, twin = leaf(x), leaf(x)
    expected = F.gaussian_nll_loss(twin.double(), target, torch.ones_like(target), full=True, reduction="sum")
    assert_as_torch(FV.gaussian_nll(x, target, 0.0, "sum"), expected, x, twin)


@each_place("latent_forward", OPERATOR, dtype=torch.float64)
def test_the_elbo_of_float64_data(place):
    source = Source(place.device)
    recon, mu, logvar = (leaf(t) for t in source.uniform(3, 6, 5))
    target = source.uniform(6, 5, dtype=torch.float64)
    for likelihood in ("bernoulli_logits", "bernoulli", "gaussian"):
        loss = FV.elbo_loss(recon, target, mu, logvar, likelihood=likelihood).loss
        single = FV.elbo_loss(recon, target.float(), mu, logvar, likelihood=likelihood).loss
        torch.testing.assert_close(loss.float(), single)
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, [recon, mu, logvar]))
    torch.testing.assert_close(
        fastvae.vae_loss(target, recon, mu, logvar)[0].float(), fastvae.vae_loss(target.float(), recon, mu, logvar)[0]
    )


@each_place_of_float64
def test_a_float64_target_that_learns(place):
    source = Source(place.device)
    x, target = leaf(source.normal(6, 5)), leaf(source.uniform(6, 5, dtype=torch.float64))
    twins = leaf(x), leaf(target)
    FV.mse_loss(x, target).backward()
    torch_mse_loss(*twins).backward()
    torch.testing.assert_close((x.grad, target.grad), (twins[0].grad, twins[1].grad))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_cross_entropy_refuses_the_targets_that_torch_refuses(dtype):
    x = torch.rand(6, 5)
    for loss in (FV.binary_cross_entropy_with_logits, FV.binary_cross_entropy):
        with pytest.raises(TypeError, match=f"target: got {dtype}"):
            loss(x, torch.ones(6, 5).to(dtype))
