"""Results come in the precision of what the caller has: the dtype of the data or of the parameters, whatever is computed in between."""

import functools

import pytest
import torch
from _helpers import Source
from torch import nn

from fastvae.models import AE, VAE, ContractiveAE, DenoisingAE, ImageVAE, SparseAE
from fastvae.nn import GaussianNLL, GroupNormSiLU, MinMaxScaler, StandardScaler, UpsampleConv2d
from fastvae.nn.corruption import GaussianNoise, Masking, SaltAndPepper

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def residual(precision: str) -> ImageVAE:
    torch.manual_seed(0)
    return ImageVAE.residual(channels=(8, 16), blocks=1, groups=4, latent_channels=2, image_size=16, precision=precision)


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float32"])
def test_a_residual_vae_gives_numpy_arrays(precision):
    model, x = residual(precision), Source("cpu").uniform(3, 3, 16, 16)
    results = [model.sample(2), model.reconstruct(x), model.reconstruct((255 * x).to(torch.uint8)), model.interpolate(x, x, 3)]
    results += [model.anomaly_score(x), model.decode(torch.zeros(1, 2, 8, 8)).detach(), *(t.detach() for t in model(x))]
    assert all(result.numpy().dtype == "float32" for result in results)


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_residual_vae_answers_in_the_dtype_of_its_parameters(precision, dtype):
    model, x = residual(precision).to(dtype), Source("cpu", dtype).uniform(3, 3, 16, 16)
    output = model(x)
    output.loss.backward()
    images = [model.sample(2), model.reconstruct(x), model.reconstruct((255 * x).to(torch.uint8)), model.interpolate(x, x, 3), output.recon]
    assert all(image.dtype == dtype for image in images)
    assert all(t.dtype == wide(dtype) for t in (output.loss, output.recon_loss, output.kl, output.mu, output.logvar, output.z))
    assert all(p.grad.dtype == dtype for p in model.parameters())


def test_a_residual_vae_under_the_autocast_of_its_caller():
    model, x = residual("auto"), Source("cpu").uniform(3, 3, 16, 16)
    with torch.autocast("cpu", torch.float16):
        output = model(x)
        assert output.recon.dtype == model.sample(2).dtype == torch.float16
    assert output.loss.dtype == output.mu.dtype == torch.float32


@each_dtype
@pytest.mark.parametrize("make", [lambda: VAE.conv(3), lambda: VAE.mlp(latent_dim=3)], ids=["conv", "mlp"])
def test_a_vae_answers_in_the_dtype_of_its_parameters(make, dtype):
    model, x = make().to(dtype), Source("cpu", dtype).uniform(3, 1, 28, 28)
    images = [model.sample(2), model.reconstruct(x), model.reconstruct((255 * x).to(torch.uint8)), model.interpolate(x, x, 3)]
    assert all(image.dtype == dtype for image in images)
    assert model(x).loss.dtype == model.anomaly_score(x).dtype == wide(dtype)


def test_a_decoder_without_parameters_is_sampled():
    model = VAE(nn.Linear(4, 8).double(), nn.Identity(), 4, likelihood="gaussian")
    assert model.sample(2).dtype == torch.get_default_dtype()
    assert model.reconstruct(torch.zeros(2, 4, dtype=torch.float64)).dtype == torch.float64


@each_dtype
@pytest.mark.parametrize(
    "make",
    [AE.mlp, DenoisingAE.mlp, SparseAE.mlp, functools.partial(SparseAE.mlp, penalty="l1"), ContractiveAE.mlp],
    ids=["plain", "denoising", "sparse", "sparse-l1", "contractive"],
)
def test_an_autoencoder_answers_in_the_dtype_of_its_parameters(make, dtype):
    torch.manual_seed(0)
    model = make((1, 4, 4), (), 5, code="sigmoid").to(dtype)
    x = Source("cpu", dtype).uniform(7, 1, 4, 4)
    output = model(x)
    assert output.recon.dtype == output.z.dtype == model.reconstruct(x).dtype == model.encode((255 * x).to(torch.uint8)).dtype == dtype
    assert output.loss.dtype == output.recon_loss.dtype == output.penalty.dtype == model.anomaly_score(x).dtype == wide(dtype)


def test_a_sparse_penalty_in_float64_is_not_rounded():
    x = Source("cpu", torch.float64).uniform(7, 16)
    model = SparseAE(nn.Identity(), nn.Identity(), rho=0.1)
    rho_hat = x.mean(0)
    expected = (0.1 * (0.1 / rho_hat).log() + 0.9 * (0.9 / (1 - rho_hat)).log()).sum()
    torch.testing.assert_close(model(x).penalty, expected, rtol=1e-12, atol=0)


SCALERS = {"unit": MinMaxScaler, "tanh": lambda: MinMaxScaler(-1, 1), "z": StandardScaler}


@pytest.mark.parametrize("fitted", DTYPES, ids=str)
@each_dtype
@pytest.mark.parametrize("make", SCALERS.values(), ids=SCALERS)
def test_a_scaler_answers_in_the_dtype_of_the_data(make, dtype, fitted):
    """Whatever it was fitted to, and rounded once."""
    data, x = Source("cpu", fitted).normal(50, 3), Source("cpu", dtype, seed=1).normal(5, 3)
    scaler = make().fit(data)
    assert scaler.offset.dtype == scaler.scale.dtype == wide(fitted)
    y = scaler(x)
    assert y.dtype == scaler.inverse(y).dtype == dtype
    exact = make().fit(data.double())
    tolerances = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6 if wide(fitted) == torch.float32 else 1e-12}
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=max(tolerances["rtol"], 1e-5), atol=max(tolerances["atol"], 1e-6))


@pytest.mark.parametrize("fitted", [torch.float64, torch.float32], ids=str)
def test_a_scaler_answers_integers_in_the_dtype_of_its_statistics(fitted):
    scaler = MinMaxScaler().fit(torch.tensor([[0.0], [10.0]], dtype=fitted))
    assert torch.equal(scaler(torch.tensor([[5]])), torch.tensor([[0.5]], dtype=fitted))
    assert scaler(torch.tensor([[255]], dtype=torch.uint8)).dtype == fitted


def test_a_scaler_fitted_to_integers():
    scaler = StandardScaler().fit(torch.tensor([[1], [3]]))
    assert scaler(torch.tensor([[3.0]])) == 1.0


@each_dtype
@pytest.mark.parametrize("corruption", [GaussianNoise(), Masking(), SaltAndPepper()], ids=str)
def test_a_corruption_answers_in_the_dtype_of_the_data(corruption, dtype):
    assert corruption(torch.ones(4, 5, dtype=dtype)).dtype == dtype


@each_dtype
def test_layers_answer_in_the_dtype_of_the_data(dtype):
    x = Source("cpu", dtype).normal(2, 4, 5, 5)
    assert GroupNormSiLU(2, 4)(x.float() if dtype == torch.float64 else x).dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert GroupNormSiLU(2, 4).to(dtype)(x).dtype == UpsampleConv2d(4, 4).to(dtype)(x).dtype == dtype
    assert GaussianNLL()(x, x).dtype == wide(dtype)


def test_a_fitted_threshold_is_the_callers_own():
    """Fitting again does not change what was given before."""
    model = AE.mlp((1, 4, 4), (), 5)
    x = Source("cpu").uniform(20, 1, 4, 4)
    first = model.fit_threshold(x, 0.5)
    value = first.clone()
    model.fit_threshold(x + 1, 0.5)
    assert torch.equal(first, value)
    assert model.threshold > first


def test_a_threshold_follows_its_buffer():
    x = Source("cpu").uniform(20, 1, 4, 4)
    model, other = (AE.mlp((1, 4, 4), (), 5) for _ in range(2))
    model.fit_threshold(x)
    for ours, theirs in zip(other.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
    assert other.threshold == model.threshold
    assert other.is_anomaly(x + 10).all()
