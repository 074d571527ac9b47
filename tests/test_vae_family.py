"""Every model of the VAE family learns, is stored, draws samples, compiles, runs in bfloat16, and names what does not fit."""

import copy

import pytest
import torch
from _helpers import brief

for package in ("lightning", "sklearn", "safetensors", "huggingface_hub", "zuko"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train,flows]")

from _family import DIM, FAMILY, SHAPE, digits  # noqa: E402
from torch import nn  # noqa: E402

from fastvae.distributions import CholeskyPosterior, DiagonalPrior, FlowPosterior, MixturePrior, VampPrior  # noqa: E402
from fastvae.models import DIPVAE, IWAE, VAE, WAE, BetaTCVAE, FactorVAE, InfoVAE  # noqa: E402
from fastvae.training.adversarial import parameter_groups, total_loss  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
each_model = pytest.mark.parametrize("name", FAMILY)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The loss with the noise of one seed, and that of a discriminator where there is one."""
    torch.manual_seed(1)
    return total_loss(model(x))


@pytest.mark.prove
@each_model
def test_64_digits_are_learned_by_heart(name):
    """Their mean image has an error of 1; the model's reconstructions have less than half of it."""
    model, x = FAMILY[name](), digits()
    optimizer = torch.optim.Adam(parameter_groups(model), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(400):
        optimizer.zero_grad()
        loss = total_loss(model(x))
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    error = (model.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5


@each_model
def test_all_weights_have_gradients(name):
    model, x = FAMILY[name](), digits(6)
    loss_of(model, x).backward()
    expected = {key for key, _ in model.named_parameters()}
    # The gradient of a WAE does not reach the weights of a mixture, whose draws are not differentiable in them.
    expected -= {"prior.logits"} if name in ("WAE, mixture prior", "InfoVAE, mixture prior") else set()
    assert gradients(model).keys() >= expected
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@each_model
def test_a_model_is_made_again_from_its_folder(name, tmp_path):
    model, x = FAMILY[name](), digits(6)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert repr(again) == repr(model)
    assert torch.equal(loss_of(again, x), loss_of(model, x))


@each_model
def test_a_copy_and_a_state_dict_are_the_same_model(name):
    model, x = FAMILY[name](), digits(6)
    other = FAMILY[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(other, x), loss_of(model, x))
    assert torch.equal(loss_of(copy.deepcopy(model), x), loss_of(model, x))


@each_model
def test_samples_and_reconstructions_are_data(name):
    model, x = FAMILY[name](), digits(6)
    drawn = [model.sample(5, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn)
    for images, count in ((drawn[0], 5), (model.reconstruct(x), 6)):
        assert images.shape == (count, *SHAPE)
        assert not images.requires_grad
        assert (images >= 0).all()
        assert (images <= 1).all()


@pytest.mark.parametrize("name", [name for name in FAMILY if "WAE" not in name])
def test_the_bound_rises_with_its_samples(name):
    """Of an untrained model, whose posterior fits badly, with the error of the mean over 64 digits."""
    model, x = FAMILY[name](), digits()
    bounds = [model.log_prob_bound(x, k, generator=torch.Generator().manual_seed(0)) for k in (1, 20)]
    assert bounds[0].shape == (64,)
    assert bounds[0].mean() < bounds[1].mean()


@pytest.mark.parametrize("name", [name for name in FAMILY if not name.startswith("WAE")])
def test_noise_that_is_given_makes_the_draws(name):
    model, x = FAMILY[name](), digits(6)
    eps = torch.randn(*([3] if "IWAE" in name else []), 6, DIM)
    assert torch.equal(model(x, eps=eps).z, model(x, eps=eps).z)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(*(model(x, generator=generator).loss for generator in generators))


# A compiler takes up to half a minute for a model; the rest of the family is a long proof.
COMPILED = {"VAE", "flow prior", "WAE, mixture prior"}


@pytest.mark.parametrize("name", brief(FAMILY.keys(), COMPILED))
def test_whole_loss_compiles(name):
    model, x = FAMILY[name](), digits(6)
    loss_of(model, x).backward()
    expected = {key: gradient.clone() for key, gradient in gradients(model).items()}
    model.zero_grad()
    # All models share the code of VAE.forward, which is compiled a limited number of times.
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = loss_of(compiled, x)
    torch.testing.assert_close(loss, loss_of(model, x), rtol=1e-4, atol=1e-4)
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-4)


@each_model
def test_a_bfloat16_model_takes_8_bit_images(name):
    model, x = FAMILY[name]().to(torch.bfloat16), (digits(6) * 255).to(torch.uint8)
    output = model(x)
    assert output.recon.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert model.sample(3).dtype == torch.bfloat16


BAD_OPTIONS = [
    (lambda: VAE.mlp(num_samples=0), "num_samples: got 0"),
    (lambda: IWAE.mlp(num_samples=0), "num_samples: got 0"),
    (lambda: IWAE.mlp(num_samples=2.0), "num_samples: got 2.0"),
    (lambda: IWAE.mlp(gradient="doubly"), "gradient: got 'doubly', takes one of 'standard', 'doubly_reparameterized'"),
    (lambda: IWAE.mlp(latent_dim=2, gradient="doubly_reparameterized", posterior=FlowPosterior(2)), "posterior: got FlowPosterior"),
    (lambda: BetaTCVAE.mlp(dataset_size=0), "dataset_size: got 0"),
    (lambda: BetaTCVAE.mlp(dataset_size=9, alpha=-1.0), "alpha: got -1.0"),
    (lambda: BetaTCVAE.mlp(dataset_size=9, estimator="biased"), "estimator: got 'biased'"),
    (lambda: DIPVAE.mlp(kind="iii"), "kind: got 'iii'"),
    (lambda: DIPVAE.mlp(diagonal=-1.0), "diagonal: got -1.0"),
    (lambda: DIPVAE.mlp(posterior=CholeskyPosterior()), "posterior: got CholeskyPosterior"),
    (lambda: FactorVAE.mlp(gamma=-1.0), "gamma: got -1.0"),
    (lambda: FactorVAE.mlp(discriminator_layers=0), "discriminator_layers: got 0"),
    (lambda: FactorVAE(nn.Identity(), nn.Identity()), "latent_shape: got None"),
    (lambda: InfoVAE.mlp(alpha=2.0), "alpha: got 2.0"),
    (lambda: InfoVAE.mlp(alpha=-1.0, weight=1.0), "weight: got 1.0, takes a number of at least 1 - alpha, 2.0"),
    (lambda: InfoVAE.mlp(kernel="linear"), "kernel: got 'linear'"),
    (lambda: InfoVAE(nn.Identity(), nn.Identity()), "latent_shape: got None"),
    (lambda: WAE.mlp(weight=-1.0), "weight: got -1.0"),
    (lambda: WAE(nn.Identity(), nn.Identity()), "latent_shape: got None"),
    (lambda: VAE.mlp(latent_dim=3, prior=MixturePrior(2)), "latent_shape: got 3, the prior is of \\(2,\\)"),
    (lambda: VAE.mlp(prior=VampPrior(20, (1, 28, 28)), posterior=CholeskyPosterior()), "posterior: got CholeskyPosterior"),
]


@pytest.mark.parametrize(("make", "message"), BAD_OPTIONS, ids=[message for _, message in BAD_OPTIONS])
def test_an_option_that_does_not_fit_is_named_when_the_model_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


BAD_CALLS = [
    (lambda: VAE(nn.Flatten(), nn.Linear(2, 8), prior=DiagonalPrior(3)), "prior: is of shape \\(3,\\), the encoder gave a posterior of"),
    (lambda: VAE(nn.Flatten(), nn.Linear(2, 8), 3), "prior: is of shape \\(3,\\), the encoder gave a posterior of shape \\(4,\\)"),
    (lambda: WAE(nn.Flatten(), nn.Linear(8, 8), 3), "prior: is of shape \\(3,\\), the encoder gave codes of shape \\(8,\\)"),
    (lambda: IWAE(nn.Flatten(), nn.Linear(4, 7), 4), "decoder: gave shape \\(50, 7\\), has to give \\(50, 1, 2, 4\\)"),
    (lambda: VAE(nn.Flatten(), nn.Linear(8, 8), posterior=FlowPosterior(3)), "encoder: gave shape \\(10, 8\\), has to give"),
    (lambda: VAE(nn.Flatten(), nn.Linear(8, 8), posterior=CholeskyPosterior()), "encoder: gave shape \\(10, 8\\), has to give"),
    (lambda: DIPVAE(nn.Conv2d(1, 4, 1), nn.Conv2d(2, 1, 1)), "encoder: gave a posterior of shape \\(2, 2, 4\\), the covariance takes"),
    (lambda: BetaTCVAE(nn.Conv2d(1, 4, 1), nn.Conv2d(2, 1, 1), dataset_size=99), "encoder: gave a posterior of shape \\(2, 2, 4\\)"),
    (lambda: BetaTCVAE.mlp((1, 2, 4), (), 2, dataset_size=9), "dataset_size: got 9 for a batch of 10"),
]


@pytest.mark.parametrize(("make", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_parts_that_do_not_fit_each_other_are_named_by_a_call(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()(torch.rand(10, 1, 2, 4))


def test_counts_of_the_bound_are_checked():
    model = VAE.mlp((1, 2, 4), (), 2)
    with pytest.raises(ValueError, match=r"^num_samples: got 0"):
        model.log_prob_bound(torch.rand(3, 1, 2, 4), 0)
    with pytest.raises(ValueError, match=r"^samples_at_once: got 0"):
        model.log_prob_bound(torch.rand(3, 1, 2, 4), 3, samples_at_once=0)


@pytest.mark.parametrize("name", ["InfoVAE", "WAE", "FactorVAE"])
def test_a_model_that_compares_samples_takes_two(name):
    with pytest.raises(ValueError, match=r"^x: got a batch of 1, the (discrepancy|discriminator) takes at least 2"):
        FAMILY[name]()(digits(1))
