"""Training steps that nobody can read values of: tensors without data, batches of incoming gradients, traces."""

import copy

import pytest
import torch
from _helpers import Source, leaf, places
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastvae import functional as FV
from fastvae import models

VAES = {
    "convolutional VAE": (lambda: models.VAE.conv(latent_dim=4), (2, 1, 28, 28)),
    "MLP VAE": (lambda: models.VAE.mlp(784, latent_dim=4), (2, 784)),
    "ImageVAE": (lambda: models.ImageVAE.residual(3, (32, 64), blocks=1), (2, 3, 16, 16)),
    "ImageVAE in bfloat16": (lambda: models.ImageVAE.residual(3, (32, 64), blocks=1, precision="bfloat16"), (2, 3, 16, 16)),
}
each_vae = pytest.mark.parametrize(("make", "shape"), VAES.values(), ids=VAES)

# Losses of one tensor whose gradient the forward pass writes, and operators beside them.
SCALARS = {
    "BCE from logits": (places("reconstruction_forward"), lambda x: FV.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.3))),
    "BCE": (places("reconstruction_forward"), lambda x: FV.binary_cross_entropy(x.sigmoid(), torch.full_like(x, 0.3))),
    "MSE": (places("reconstruction_forward"), lambda x: FV.mse_loss(x, torch.full_like(x, 0.3))),
    "Gaussian": (places("reconstruction_forward"), lambda x: FV.gaussian_nll(x, torch.full_like(x, 0.3), x.mean())),
    "mixture of logistics": (
        places("logistic_mixture_forward"),
        lambda x: FV.logistic_mixture_nll(x[:, :2, None], torch.full_like(x[:, :1, None], 0.3), 1),
    ),
    "KL": (places("latent_forward"), lambda x: FV.kl_normal(x, x, free_bits=0.1)),
    "sample": (places("latent_forward"), lambda x: FV.reparameterize(x, x, seed=3).square().sum()),
    "contractive penalty": (places("jacobian_forward"), lambda x: FV.contractive_penalty(x.sigmoid(), torch.full((4, 5), 0.2))),
    "RMS norm": (places("rms_norm_forward"), lambda x: FV.rms_norm_silu(x[..., None]).square().sum()),
    "snake": (places("snake_forward"), lambda x: FV.snake(x[..., None], torch.ones_like(x[0])).square().sum()),
    "binary codes": (places("binary_code_entropy_forward"), lambda x: sum(e.sum() for e in FV.binary_code_entropy(x[..., :4], 0.7))),
    "residual codes": (
        places("codebook_residual_quantize"),
        lambda x: sum(output.sum() for output in FV.residual_quantize(x, x.detach()[None, :2].repeat(3, 1, 1))[::2]),
    ),
    "GroupNorm": (places("group_norm_forward"), lambda x: FV.group_norm_silu(x[..., None], 2).square().sum()),
}
each_scalar = pytest.mark.parametrize(
    ("place", "function"),
    [pytest.param(place, function, id=f"{name}-{place}") for name, (served, function) in SCALARS.items() for place in served],
)


def train(model, x) -> None:
    model(x).loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@each_vae
def test_a_vae_takes_a_training_step_on_the_meta_device(make, shape):
    with torch.device("meta"):
        train(make(), torch.rand(shape))


@each_vae
def test_a_vae_takes_a_training_step_of_fake_tensors(make, shape):
    """As tools that estimate memory do: real parameters become fake ones."""
    model = make()
    with FakeTensorMode() as mode:
        parameters = {name: leaf(mode.from_tensor(parameter)) for name, parameter in model.named_parameters()}
        loss = torch.func.functional_call(model, parameters, (torch.rand(shape),)).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]


def test_a_copy_of_a_model_on_the_meta_device_leaves_the_original_alone():
    model = models.VAE.mlp(784, latent_dim=4)
    train(copy.deepcopy(model).to("meta"), torch.rand(2, 784, device="meta"))
    train(model, torch.rand(2, 784))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_there_is_nothing_to_validate_in_a_tensor_without_data(device):
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        x = torch.rand(3, 4)
        assert FV.binary_cross_entropy(x, x, validate=True).shape == ()


@each_scalar
def test_a_batch_of_incoming_gradients(place, function):
    x = leaf(Source(place.device).normal(6, 4))
    factors = torch.tensor([1.0, 2.0, -0.5], device=place.device)
    (batched,) = torch.autograd.grad(function(x), x, factors, is_grads_batched=True)
    (single,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(batched, factors.view(-1, 1, 1) * single)


@each_scalar
def test_a_vectorised_jacobian(place, function):
    x = Source(place.device).normal(6, 4)
    vectorised, plain = (
        torch.autograd.functional.jacobian(lambda x: torch.stack([function(x), 3 * function(x)]), x, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(vectorised, plain)


@each_scalar
def test_make_fx_traces_a_step(place, function):
    def gradient(x):
        return torch.autograd.grad(function(x), x)[0]

    x, other = (leaf(Source(place.device, seed=seed).normal(6, 4)) for seed in range(2))
    traced = make_fx(gradient)(x)
    torch.testing.assert_close(traced(other), gradient(other))
