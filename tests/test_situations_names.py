"""What a user reads and writes: the help of a function, the options in a signature, the fields of an output, the repr of a module, the
keys of a state_dict, and the ways to make a model."""

import copy
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from fastvae import _types, compat, models, reference
from fastvae import functional as FV
from fastvae import nn as fnn
from fastvae.distributions.names import LIKELIHOODS
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.jacobian import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (FV, fnn, models, reference)


def public(*packages) -> dict[str, object]:
    """Functions, and classes with their public methods, by their names."""
    found = {}
    for package in packages:
        for name in package.__all__:
            thing = getattr(package, name)
            found[f"{package.__name__}.{name}"] = thing
            if inspect.isclass(thing) and issubclass(thing, nn.Module):
                methods = {key: getattr(thing, key) for key, value in vars(thing).items() if not key.startswith("_")}
                found |= {f"{package.__name__}.{name}.{key}": method for key, method in methods.items() if callable(method)}
    return found


CONSTRUCTED = {name: thing for name, thing in public(fnn, models).items() if inspect.isclass(thing) and issubclass(thing, nn.Module)}
FUNCTIONS = {f"fastvae.functional.{name}": getattr(FV, name) for name in FV.__all__ if not inspect.isclass(getattr(FV, name))}
NETWORKS = {name: thing for name, thing in public(models).items() if inspect.ismethod(thing)}


def documented_arguments(thing) -> set[str]:
    """The names before the colons of the section ``Args``."""
    section = re.search(r"Args:\n(.*?)(\n\n|\Z)", inspect.getdoc(thing), re.DOTALL)
    entries = re.findall(r"^    (\w[\w, \n]*?):", section[1], re.MULTILINE) if section else []
    return {name.strip() for entry in entries for name in entry.split(",")}


@pytest.mark.parametrize("name", [*FUNCTIONS, *CONSTRUCTED])
def test_help_is_complete_in_itself(name):
    """Each argument has its entry, and none sends the reader to another function; a short function may say all in a sentence."""
    thing = {**FUNCTIONS, **CONSTRUCTED}[name]
    text = inspect.getdoc(thing)
    assert "$" not in text
    assert name.startswith("fastvae.models.") or not re.search(r"^    [\w, ]+: (as in|see) :\w+:`(?!torch)", text, re.MULTILINE)
    parameters = set(inspect.signature(thing).parameters)
    if "Args:" in text:
        assert parameters - {"device", "dtype"} <= documented_arguments(thing) | {"device", "dtype"}
    else:
        assert all(f"``{parameter}``" in text for parameter in parameters) or len(parameters) <= 2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_help_of_a_network_names_its_sizes(name):
    assert set(inspect.signature(NETWORKS[name]).parameters) <= documented_arguments(NETWORKS[name])


def test_the_package_works_without_docstrings():
    code = "import fastvae.nn, fastvae.models, fastvae.compat; print(fastvae.functional.mse_loss.__doc__)"
    result = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "None"


@pytest.mark.parametrize("name", public(*PACKAGES))
def test_a_string_option_names_its_values_in_the_signature(name):
    thing = public(*PACKAGES)[name]
    if inspect.isclass(thing) and issubclass(thing, tuple):
        return
    assert [p.name for p in inspect.signature(thing).parameters.values() if p.annotation in (str, str | None)] == []


def test_the_values_of_options_are_those_of_the_operators():
    assert set(typing.get_args(_types.Reduction)) == set(REDUCTIONS)
    assert set(typing.get_args(_types.BoundReduction)) < set(REDUCTIONS)
    assert set(typing.get_args(_types.Activation)) == set(ACTIVATIONS)
    assert set(typing.get_args(_types.NormActivation)) == set(NORM_ACTIVATIONS)
    assert set(typing.get_args(_types.ReconLoss)) == set(models.autoencoder.RECON_LOSSES)
    assert set(typing.get_args(_types.Likelihood)) == set(LIKELIHOODS)


CLASS_WORDS = {"class_kl", "classification_loss", "accuracy", "logits"}
LEVEL_WORDS = {"kls", "level_loss"}
DISENTANGLING_WORDS = {"mutual_information", "total_correlation", "dimension_kl", "discriminator_loss", "mmd"}
WORDS = {
    "loss",
    "losses",
    "recon_loss",
    "kl",
    "penalty",
    "vq_loss",
    "recon",
    "z",
    "mu",
    "logvar",
    "quantized",
    "indices",
    "perplexity",
    "usage",
}


def test_the_fields_of_outputs_share_their_words():
    outputs = [thing for thing in public(FV, fnn, models).values() if inspect.isclass(thing) and issubclass(thing, tuple)]
    fields = {field for output in outputs if output not in (FV.JacobianMethod, fnn.Condition) for field in output._fields}
    assert fields == WORDS | CLASS_WORDS | LEVEL_WORDS | DISENTANGLING_WORDS
    assert all(output._fields[:2] == ("loss", "recon_loss") for output in outputs if "recon_loss" in output._fields)


MODULES = {
    "AE": (lambda: models.AE.linear(4, 2), ["recon_loss='mse'"]),
    "SparseAE": (lambda: models.SparseAE.linear(4, 2, penalty="l1"), ["recon_loss='mse'", "penalty='l1'", "weight=1.0", "rho=0.05"]),
    "ContractiveAE": (lambda: models.ContractiveAE.linear(4, 2, chunk_size=3), ["recon_loss='mse'", "weight=0.1", "chunk_size=3"]),
    "DenoisingAE": (lambda: models.DenoisingAE.linear(4, 2), ["(corruption): GaussianNoise(sigma=0.3)"]),
    "VAE": (lambda: models.VAE.mlp(4, (3,), 2, beta=2.0), ["latent_shape=(2,)", "free_bits=0.0", "num_samples=None", "KLPenalty(beta=2.0"]),
    "ImageVAE": (lambda: models.ImageVAE.conv(2, precision="float32"), ["latent_shape=(2,)", "precision='float32'"]),
    "VQVAE": (lambda: models.VQVAE.conv(1, num_codes=8, dim=4, channels=8), ["data_variance=1.0", "VectorQuantizer(8, 4, update='ema'"]),
    "VQVAE2": (lambda: models.VQVAE2.conv(1, num_codes=8, dim=4, channels=8), ["data_variance=1.0"]),
    "ELBOLoss": (fnn.ELBOLoss, ["likelihood='bernoulli_logits'", "beta=1.0", "capacity=None", "free_bits=0.0", "reduction='batchmean'"]),
    "ResidualVectorQuantizer": (lambda: fnn.ResidualVectorQuantizer(2, 4, 3), ["quantizer_dropout=False", "min_quantizers=1"]),
    "VectorQuantizer2": (lambda: compat.VectorQuantizer2(4, 3, 0.25), ["4, 3, beta=0.25, sane_index_shape=False, legacy=True"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_module_shows_its_options(name):
    make, shown = MODULES[name]
    text = repr(make())
    assert [part for part in shown if part not in text] == []


# One way to make a model: of modules, or of a network by its name.


@pytest.mark.parametrize("kind", [models.AE, models.DenoisingAE, models.SparseAE, models.ContractiveAE, models.StackedAE])
def test_every_autoencoder_has_the_networks(kind):
    for model in (kind.mlp(4, (3,), 2, recon_loss="bce_with_logits"), kind.linear(4, 2), kind.conv(2)):
        assert type(model) is kind
    assert kind.mlp(4, (3,), 2, recon_loss="bce_with_logits").recon_loss == "bce_with_logits"
    model = kind.mlp(4, (3,), 2)
    assert type(kind(model.encoder, model.decoder)) is kind


@pytest.mark.parametrize("kind", [models.VAE, models.ImageVAE])
def test_every_vae_has_the_networks(kind):
    x = torch.rand(2, 1, 28, 28)
    for model in (kind.mlp(beta=2.0), kind.conv(beta=2.0)):
        assert type(model) is kind
        assert model.kl_penalty.beta == 2.0
        assert model(x).recon.shape == x.shape
        assert model.sample(2).shape == x.shape
        assert kind(model.encoder, model.decoder, model.latent_shape).sample(2).shape == x.shape


def test_a_vqvae2_is_made_of_modules():
    model = models.VQVAE2.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1).eval()
    same = models.VQVAE2(**dict(model.named_children())).eval()
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(same.reconstruct(x), model.reconstruct(x))


# What a state_dict holds.

PLAIN = {
    "VAE": lambda: models.VAE.mlp(4, (3,), 2),
    "AE": lambda: models.AE.mlp(4, (3,), 2),
    "StackedAE": lambda: models.StackedAE.mlp(4, (3,), 2),
    "ELBOLoss": fnn.ELBOLoss,
    "KLPenalty": lambda: fnn.KLPenalty(2.0, 1.0),
    "quantizer": lambda: fnn.VectorQuantizer(8, 4, update="gradient"),
    "ReparameterizeKL": fnn.ReparameterizeKL,
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_state_holds_nothing_that_nobody_asked_for(name):
    module = PLAIN[name]()
    assert module.state_dict().keys() == dict(module.named_parameters()).keys()


def test_a_state_holds_what_the_options_of_a_quantizer_use():
    assert fnn.VectorQuantizer(8, 4).state_dict().keys() == {"codebook", "ema_sum", "ema_count"}
    assert fnn.VectorQuantizer(8, 4, kmeans_iters=2).state_dict().keys() == {"codebook", "ema_sum", "ema_count", "started"}
    assert fnn.VectorQuantizer(8, 4, update="gradient", revive_below=1.0).state_dict().keys() == {"codebook", "ema_count"}


def test_a_codebook_that_is_loaded_does_not_start_again():
    """Whether the checkpoint is of a layer with k-means or without."""
    torch.manual_seed(0)
    x = torch.randn(100, 4)
    for options in ({}, {"kmeans_iters": 3}):
        source, target = fnn.VectorQuantizer(8, 4, **options), fnn.VectorQuantizer(8, 4, kmeans_iters=3)
        source(x)
        assert target.load_state_dict(copy.deepcopy(source.state_dict())) == ([], [])
        assert torch.equal(target(x).indices, source.eval()(x).indices)
        plain = fnn.VectorQuantizer(8, 4)
        assert plain.load_state_dict(source.state_dict()) == ([], [])
        assert torch.equal(plain.codebook, source.codebook)


def test_a_threshold_is_a_part_of_the_state_once_it_is_fitted():
    model, x = models.AE.mlp(4, (3,), 2), torch.rand(20, 4)
    before = copy.deepcopy(model.state_dict())
    assert "threshold" not in before
    model.double().fit_threshold(x.double())
    assert model.state_dict()["threshold"].dtype == torch.float64
    fitted = models.AE.mlp(4, (3,), 2)
    fitted.load_state_dict(model.state_dict())
    assert fitted.threshold == model.threshold.float()
    assert "threshold" in fitted.state_dict()
    # A state without a threshold is loaded as one without.
    fitted.load_state_dict(before)
    assert "threshold" not in fitted.state_dict()
    with pytest.raises(RuntimeError, match="threshold: has not been fitted"):
        fitted.is_anomaly(x)
    # So is a part of one, whose weights have no threshold yet.
    model.load_state_dict({"encoder.0.1.bias": torch.zeros(3)}, strict=False)
    assert "threshold" not in model.state_dict()


@pytest.mark.parametrize("name", PLAIN)
def test_a_module_is_made_and_loaded_on_the_meta_device(name):
    with torch.device("meta"):
        module = PLAIN[name]()
    source = PLAIN[name]()
    assert module.load_state_dict(source.state_dict(), assign=True) == ([], [])
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in module.state_dict().items())


def test_copies_keep_what_is_stored():
    model, loss = models.AE.mlp(4, (3,), 2), fnn.ELBOLoss(beta=fnn.LinearSchedule(4))
    model.fit_threshold(torch.rand(20, 4))
    assert "threshold" in copy.deepcopy(model).state_dict()
    assert copy.deepcopy(loss).state_dict().keys() == {"num_steps"}


# Options that work in every dtype and on every device.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [models.VQVAE, models.VQVAE2])
def test_8_bit_images_in_a_vqvae_of_any_dtype(kind, dtype):
    torch.manual_seed(0)
    model = kind.conv(3, num_codes=8, dim=4, channels=8, hidden=4, blocks=1).to(dtype).eval()
    x = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert model(x).recon.dtype == dtype
    torch.testing.assert_close(model.reconstruct(x), model.reconstruct(x.to(dtype) / 255))
    for ours, theirs in zip(model.encode(x), model.encode(x.to(dtype) / 255), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("corruption", [fnn.GaussianNoise(), fnn.Masking(), fnn.SaltAndPepper()], ids=lambda c: type(c).__name__)
def test_a_generator_on_the_cpu_corrupts_tensors_on_another_device(corruption):
    x, generator = torch.rand(5, 4), torch.Generator().manual_seed(1)
    first = corruption(x, generator)
    assert torch.equal(corruption(x, generator.manual_seed(1)), first)
    state = generator.manual_seed(1).get_state()
    assert corruption(x.to("meta"), generator).device.type == "meta"
    assert not torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("module", [FV, reference], ids=["functional", "reference"])
def test_a_generator_on_the_cpu_draws_projections_for_another_device(module):
    encoder, x = nn.Linear(4, 3, device="meta"), torch.rand(5, 4, device="meta")
    norm = module.jacobian_frobenius(encoder, x, method="projection", generator=torch.Generator())
    assert norm.device.type == "meta"
