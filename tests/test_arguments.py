"""Arguments that do not fit: the error names the argument, what it got and what it takes, and nothing has run by then."""

import math

import pytest
import torch
from _helpers import Recorder

import fastvae
from fastvae import functional as FV

MU = torch.zeros(4, 3)
X = torch.full((4, 3), 0.5)
SPARSE = torch.eye(4)[:, :3].to_sparse()
META = torch.zeros(4, 3, device="meta")


def latent(**changed):
    return lambda: FV.reparameterize_kl(**{"mu": MU, "logvar": MU, **changed})


def sample(**changed):
    return lambda: FV.reparameterize(**{"mu": MU, "logvar": MU, **changed})


def kl(**changed):
    return lambda: FV.kl_normal(**{"mu": MU, "logvar": MU, **changed})


def bce_with_logits(**changed):
    return lambda: FV.binary_cross_entropy_with_logits(**{"input": X, "target": X, **changed})


def bce(**changed):
    return lambda: FV.binary_cross_entropy(**{"input": X, "target": X, **changed})


def mse(**changed):
    return lambda: FV.mse_loss(**{"input": X, "target": X, **changed})


def gaussian(**changed):
    return lambda: FV.gaussian_nll(**{"input": X, "target": X, "logvar": 0.0, **changed})


def elbo(**changed):
    return lambda: FV.elbo_loss(**{"recon": X, "target": X, "mu": MU, "logvar": MU, **changed})


FLOATS = "torch.float32, torch.bfloat16, torch.float16, torch.float64"
REDUCTIONS = "'none', 'sample', 'batchmean', 'sum', 'mean'"

# A call, the error, and the argument with what it got and what it takes.
BAD = [
    (latent(mu=[1.0]), TypeError, "mu: got list, takes a tensor"),
    (latent(mu=MU.long()), TypeError, f"mu: got torch.int64, takes {FLOATS}"),
    (latent(mu=MU.to(torch.complex64)), TypeError, f"mu: got torch.complex64, takes {FLOATS}"),
    (latent(mu=SPARSE), TypeError, "mu: got a tensor of layout torch.sparse_coo, takes a dense one"),
    (latent(logvar=None), TypeError, "logvar: got NoneType, takes a tensor"),
    (latent(logvar=MU[:2]), ValueError, "logvar: got shape (2, 3), takes the shape of mu, (4, 3)"),
    (latent(logvar=MU[:1]), ValueError, "logvar: got shape (1, 3), takes the shape of mu, (4, 3)"),
    (latent(logvar=MU.double()), TypeError, "logvar: got torch.float64, takes the dtype of mu, torch.float32"),
    (latent(logvar=META), ValueError, "logvar: got a tensor on meta, takes the device of mu, cpu"),
    (kl(logvar=MU.half()), TypeError, "logvar: got torch.float16, takes the dtype of mu, torch.float32"),
    (sample(logvar=MU[0]), ValueError, "logvar: got shape (3,), takes the shape of mu, (4, 3)"),
    (latent(prior_mu=MU), ValueError, "prior_logvar: got None beside a tensor, takes both prior_mu and prior_logvar or neither"),
    (kl(prior_logvar=MU), ValueError, "prior_mu: got None beside a tensor, takes both prior_mu and prior_logvar or neither"),
    (kl(prior_mu=1.0, prior_logvar=MU), TypeError, "prior_mu: got float, takes a tensor"),
    (kl(prior_mu=MU[:2], prior_logvar=MU), ValueError, "prior_mu: got shape (2, 3), takes one that broadcasts to that of mu, (4, 3)"),
    (kl(prior_mu=MU, prior_logvar=MU[None]), ValueError, "prior_logvar: got shape (1, 4, 3), takes one that broadcasts to that of mu"),
    (kl(prior_mu=MU, prior_logvar=MU.double()), TypeError, "prior_logvar: got torch.float64, takes the dtype of mu, torch.float32"),
    (kl(prior_mu=META, prior_logvar=MU), ValueError, "prior_mu: got a tensor on meta, takes the device of mu, cpu"),
    (sample(eps=MU[:2]), ValueError, "eps: got shape (2, 3), takes the shape of the sample, (4, 3)"),
    (latent(eps=MU, num_samples=2), ValueError, "eps: got shape (4, 3), takes the shape of the sample, (2, 4, 3)"),
    (latent(eps=MU.int()), TypeError, f"eps: got torch.int32, takes {FLOATS}"),
    (latent(eps=META), ValueError, "eps: got a tensor on meta, takes the device of mu, cpu"),
    (latent(eps=MU, seed=1), ValueError, "eps, generator, seed: got more than one of them, takes at most one"),
    (sample(generator=torch.Generator(), seed=1), ValueError, "eps, generator, seed: got more than one of them, takes at most one"),
    (sample(generator=1), TypeError, "generator: got int, takes a torch.Generator"),
    (latent(seed=1.0), TypeError, "seed: got float, takes an integer or a 0-dim int64 tensor"),
    (latent(seed=True), TypeError, "seed: got bool, takes an integer or a 0-dim int64 tensor"),
    (latent(seed=2**63), ValueError, "seed: got 9223372036854775808, takes an integer of 64 bits"),
    (sample(seed=torch.tensor([1])), ValueError, "seed: got shape (1,), takes a 0-dim tensor, ()"),
    (sample(seed=torch.tensor(1, dtype=torch.int32)), TypeError, "seed: got torch.int32, takes torch.int64"),
    (sample(seed=torch.zeros((), dtype=torch.int64, device="meta")), ValueError, "seed: got a tensor on meta, takes the device of mu, cpu"),
    (sample(num_samples=0), ValueError, "num_samples: got 0, takes an integer >= 1 or None"),
    (sample(num_samples=2.0), ValueError, "num_samples: got 2.0, takes an integer >= 1 or None"),
    (latent(num_samples=True), ValueError, "num_samples: got True, takes an integer >= 1 or None"),
    (latent(free_bits=-0.1), ValueError, "free_bits: got -0.1, takes a number >= 0"),
    (latent(free_bits=math.nan), ValueError, "free_bits: got nan, takes a number >= 0"),
    (kl(free_bits=MU), ValueError, "free_bits: got tensor"),
    (kl(logvar_clamp=(3.0, -3.0)), ValueError, "logvar_clamp: got (3.0, -3.0), takes (low, high) with low <= high, or None"),
    (sample(logvar_clamp=(0.0,)), ValueError, "logvar_clamp: got (0.0,), takes (low, high)"),
    (latent(logvar_clamp=(math.nan, 1.0)), ValueError, "logvar_clamp: got (nan, 1.0), takes (low, high)"),
    (latent(logvar_clamp=5.0), ValueError, "logvar_clamp: got 5.0, takes (low, high)"),
    (latent(reduction="avg"), ValueError, f"reduction: got 'avg', takes one of {REDUCTIONS}"),
    (kl(reduction=None), ValueError, f"reduction: got None, takes one of {REDUCTIONS}"),
    (bce_with_logits(input=0.5), TypeError, "input: got float, takes a tensor"),
    (bce_with_logits(input=X.bool()), TypeError, f"input: got torch.bool, takes {FLOATS}"),
    (mse(input=SPARSE), TypeError, "input: got a tensor of layout torch.sparse_coo, takes a dense one"),
    (mse(target=X[:1]), ValueError, "target: got shape (1, 3), takes the shape of input, (4, 3)"),
    (bce(target=X[..., None]), ValueError, "target: got shape (4, 3, 1), takes the shape of input, (4, 3)"),
    (bce(target=0.5), TypeError, "target: got float, takes a tensor"),
    (bce(target=X.long()), TypeError, f"target: got torch.int64, takes {FLOATS}, torch.uint8"),
    (mse(target=X.to(torch.complex64)), TypeError, f"target: got torch.complex64, takes {FLOATS}, torch.uint8"),
    (mse(target=META), ValueError, "target: got a tensor on meta, takes the device of input, cpu"),
    (bce(weight=2.0), TypeError, "weight: got float, takes a tensor"),
    (bce(weight=X[:2]), ValueError, "weight: got shape (2, 3), takes one that broadcasts to that of input, (4, 3)"),
    (bce_with_logits(weight=X[None]), ValueError, "weight: got shape (1, 4, 3), takes one that broadcasts to that of input, (4, 3)"),
    (bce_with_logits(weight=X.to(torch.complex64)), TypeError, f"weight: got torch.complex64, takes {FLOATS}"),
    (bce_with_logits(pos_weight=X[:, :2]), ValueError, "pos_weight: got shape (4, 2), takes one that broadcasts to that of input, (4, 3)"),
    (bce_with_logits(pos_weight=META), ValueError, "pos_weight: got a tensor on meta, takes the device of input, cpu"),
    (bce(weight=X.clone().requires_grad_()), ValueError, "weight: got a tensor that requires grad, takes one that does not"),
    (bce_with_logits(pos_weight=X.clone().requires_grad_()), ValueError, "pos_weight: got a tensor that requires grad"),
    (gaussian(logvar="1"), TypeError, "logvar: got str, takes a tensor"),
    (gaussian(logvar=None), TypeError, "logvar: got NoneType, takes a tensor"),
    (gaussian(logvar=X[:2]), ValueError, "logvar: got shape (2, 3), takes one that broadcasts to that of input, (4, 3)"),
    (gaussian(logvar=X.long()), TypeError, f"logvar: got torch.int64, takes {FLOATS}"),
    (gaussian(input=None), TypeError, "input: got NoneType, takes a tensor"),
    (mse(reduction="batch"), ValueError, f"reduction: got 'batch', takes one of {REDUCTIONS}"),
    (mse(grad_scale=0), ValueError, "grad_scale: got 0, takes a finite number other than 0"),
    (mse(grad_scale=math.inf), ValueError, "grad_scale: got inf, takes a finite number other than 0"),
    (bce(grad_scale=math.nan), ValueError, "grad_scale: got nan, takes a finite number other than 0"),
    (bce(grad_scale="1"), ValueError, "grad_scale: got '1', takes a finite number other than 0"),
    (elbo(likelihood="poisson"), ValueError, "likelihood: got 'poisson', takes one of 'bernoulli_logits', 'bernoulli', 'gaussian'"),
    (elbo(reduction="mean"), ValueError, "reduction: got 'mean', takes one of 'batchmean', 'sum', 'sample'"),
    (elbo(free_bits=-1.0), ValueError, "free_bits: got -1.0, takes a number >= 0"),
    (elbo(target=X[:2]), ValueError, "target: got shape (2, 3), takes the shape of recon, (4, 3)"),
    (elbo(logvar=MU[:2]), ValueError, "logvar: got shape (2, 3), takes the shape of mu, (4, 3)"),
    (elbo(recon=None), TypeError, "recon: got NoneType, takes a tensor"),
    (lambda: fastvae.vae_loss(X, X[:2], MU, MU), ValueError, "x: got shape (4, 3), takes the shape of x_recon, (2, 3)"),
    (lambda: fastvae.vae_loss(X, X, MU, MU[:2]), ValueError, "log_var: got shape (2, 3), takes the shape of mu, (4, 3)"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_the_error_names_the_argument(call, error, message):
    with Recorder() as ran, pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)
    assert not ran.backends()


def test_a_refused_call_draws_nothing():
    state = torch.get_rng_state()
    for bad in ({"reduction": "avg"}, {"free_bits": -1.0}, {"logvar_clamp": (1.0, 0.0)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FV.reparameterize_kl(MU, MU, **bad)
    with pytest.raises(ValueError, match="logvar_clamp"):
        FV.reparameterize(MU, MU, logvar_clamp=(1.0, 0.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_validate_counts_and_places_what_lies_outside():
    target = X.clone()
    target[1, 2], target[3, 0] = 1.5, -0.25
    message = r"target: got 2 of 12 values outside \[0, 1\], the first at \[\(1, 2\), \(3, 0\)\], takes values in \[0, 1\]"
    for loss in (FV.binary_cross_entropy_with_logits, FV.binary_cross_entropy):
        assert loss(X, target).isfinite()
        with pytest.raises(ValueError, match=message):
            loss(X, target, validate=True)
    with pytest.raises(ValueError, match="input: got 2 of 12 values outside"):
        FV.binary_cross_entropy(target, X, validate=True)


def test_validate_names_five_places_at_most():
    with pytest.raises(ValueError, match=r"target: got 12 of 12 values outside") as raised:
        FV.binary_cross_entropy_with_logits(X, X + 1, validate=True)
    assert str(raised.value).count("(") == 5


def test_validate_finds_nan():
    target = X.clone()
    target[0, 1] = math.nan
    with pytest.raises(ValueError, match=r"target: got 1 of 12 values outside \[0, 1\], the first at \[\(0, 1\)\]"):
        FV.binary_cross_entropy_with_logits(X, target, validate=True)


@pytest.mark.parametrize("target", [X, X.to(torch.uint8), torch.tensor([0.0, 1.0]).repeat(6).view(4, 3)], ids=["half", "uint8", "ends"])
def test_validate_changes_no_result(target):
    for loss in (FV.binary_cross_entropy_with_logits, FV.binary_cross_entropy):
        assert torch.equal(loss(X, target, validate=True), loss(X, target))


def test_validate_checks_its_argument_first():
    with pytest.raises(TypeError, match="target: got float, takes a tensor"):
        FV.binary_cross_entropy_with_logits(X, 0.5, validate=True)


def test_what_looks_odd_and_is_allowed():
    """Limits that meet, a negative seed, a free-bits integer, a bool-free integer log variance."""
    assert FV.kl_normal(MU, MU, logvar_clamp=(0.0, 0.0)) == 0
    assert FV.reparameterize(MU, MU, seed=-1).shape == MU.shape
    assert FV.kl_normal(MU, MU, free_bits=1) == 3
    assert FV.gaussian_nll(X, X, 0).item() == pytest.approx(3 * 0.5 * math.log(2 * math.pi))
