"""Models that pythae (0.1.2) and this package both have, with the same linear networks, data and noise, in float64."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.distributions import VampPrior
from fastvae.models import IWAE, VAE, WAE, BetaTCVAE, FactorVAE, InfoVAE

PATH = Path(__file__).parent / "data" / "pythae_losses.json"
BATCH, DATA, DIM = 6, 12, 3
COMPONENTS, SAMPLES = 4, 5


@dataclass(frozen=True)
class Parts:
    """The weights and the data of every case."""

    encoder: nn.Module
    decoder: nn.Module
    x: Tensor
    pseudo_inputs: Tensor
    discriminator: nn.Module


def make_parts() -> Parts:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(DATA, 2 * DIM).double(), nn.Sequential(nn.Linear(DIM, DATA), nn.Sigmoid()).double()
    x, pseudo_inputs = torch.rand(BATCH, DATA, dtype=torch.float64), torch.rand(COMPONENTS, DATA, dtype=torch.float64)
    discriminator = nn.Sequential(nn.Linear(DIM, 8), nn.LeakyReLU(0.2), nn.Linear(8, 2)).double()
    return Parts(encoder, decoder, x, pseudo_inputs, discriminator)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _one_noise(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, eps=noise(BATCH, DIM)).loss


def _several_noises(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, eps=noise(BATCH, SAMPLES, DIM).transpose(0, 1)).loss


def _half_of_the_batch(model: nn.Module, x: Tensor) -> Tensor:
    """pythae's FactorVAE shuffles a batch and shows its networks the second half."""
    shown = torch.randperm(BATCH)[BATCH // 2 :]
    return model(x[shown], eps=noise(BATCH // 2, DIM)).loss


class _MeanOnly(nn.Module):
    """The encoder of a deterministic autoencoder."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)[:, :DIM]


def _vamp(parts: Parts, **options: Any) -> VAE:
    prior = VampPrior(DIM, DATA, COMPONENTS)
    with torch.no_grad():
        prior.pseudo_inputs.copy_(parts.pseudo_inputs)
    return VAE(parts.encoder, parts.decoder, prior=prior, **options)


def _maker(cls: type[VAE], **fixed: Any) -> Callable[..., VAE]:
    return lambda parts, **options: cls(parts.encoder, parts.decoder, DIM, likelihood="bernoulli", **fixed, **options)


@dataclass(frozen=True)
class Case:
    """A model of both packages.

    Args:
        theirs, config, arguments: pythae's class, its configuration, and the arguments of its call.
        make: this package's model of the parts.
        call: its loss, which draws noise in pythae's order.
        term: the output of pythae that is compared.
        has_value: whether the losses have the same value, and not the same gradient alone.
    """

    theirs: str
    make: Callable[[Parts], nn.Module]
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    call: Callable[[nn.Module, Tensor], Tensor] = _one_noise
    term: str = "loss"
    has_value: bool = True


CASES = {
    "VAE": Case("VAE", _maker(VAE)),
    "beta-VAE": Case("BetaVAE", _maker(VAE, beta=4.0), {"beta": 4.0}),
    # pythae takes |KL - C| for each sample and this package for the mean: the same where all samples are on one side of C.
    "capacity below the KL": Case(
        "DisentangledBetaVAE", _maker(VAE, beta=5.0, capacity=0.01), {"beta": 5.0, "C": 0.01, "warmup_epoch": 0}, {"epoch": 9}
    ),
    "capacity above the KL": Case(
        "DisentangledBetaVAE", _maker(VAE, beta=5.0, capacity=90.0), {"beta": 5.0, "C": 90.0, "warmup_epoch": 0}, {"epoch": 9}
    ),
    # The stratified weights of pythae are in the wrong places: in the first two columns, not on the diagonal and beside it.
    "beta-TC-VAE, weighted": Case(
        "BetaTCVAE",
        _maker(BetaTCVAE, alpha=0.5, beta=3.0, gamma=2.0, dataset_size=50, estimator="weighted"),
        {"alpha": 0.5, "beta": 3.0, "gamma": 2.0, "use_mss": False},
        {"dataset_size": 50},
    ),
    "InfoVAE": Case("INFOVAE_MMD", _maker(InfoVAE, alpha=0.5, weight=10.0), {"alpha": 0.5, "lbd": 10.0, "kernel_choice": "imq"}),
    # The loss of pythae has the gradient of the bound, and not its value.
    "IWAE": Case("IWAE", _maker(IWAE, num_samples=SAMPLES), {"number_samples": SAMPLES}, call=_several_noises, has_value=False),
    "VampPrior": Case("VAMP", lambda parts: _vamp(parts, likelihood="bernoulli"), {"number_components": COMPONENTS}),
    "FactorVAE": Case(
        "FactorVAE",
        lambda parts: _maker(FactorVAE, gamma=3.0, discriminator=parts.discriminator)(parts),
        {"gamma": 3.0},
        call=_half_of_the_batch,
        term="autoencoder_loss",
    ),
    "WAE": Case(
        "WAE_MMD",
        lambda parts: WAE(_MeanOnly(parts.encoder), parts.decoder, DIM, weight=7.0),
        {"reg_weight": 7.0, "kernel_choice": "imq"},
        call=lambda model, x: model(x).loss,
    ),
}


def figures(loss: Tensor, parts: Parts, has_value: bool) -> dict[str, Any]:
    """The loss, and its gradient w.r.t. the biases of encoder and decoder."""
    gradients = torch.autograd.grad(loss, [parts.encoder.bias, parts.decoder[0].bias])
    found = {"encoder gradient": gradients[0].tolist(), "decoder gradient": gradients[1].tolist()}
    return {"loss": loss.item(), **found} if has_value else found


def our_figures(case: Case) -> dict[str, Any]:
    parts = make_parts()
    model = case.make(parts).double()
    torch.manual_seed(1)
    return figures(case.call(model, parts.x), parts, case.has_value)


def their_figures(case: Case) -> dict[str, Any]:
    """Needs pythae."""
    import pythae.models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    parts = make_parts()

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.layer = parts.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mu, logvar = self.layer(x).chunk(2, dim=1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.layers = parts.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z))

    loss = {} if case.theirs == "WAE_MMD" else {"reconstruction_loss": "bce"}
    config = getattr(pythae.models, f"{case.theirs}{'_' if '_' in case.theirs else ''}Config")
    model = getattr(pythae.models, case.theirs)(
        model_config=config(input_dim=(DATA,), latent_dim=DIM, **loss, **case.config), encoder=Encoder(), decoder=Decoder()
    )
    if case.theirs == "VAMP":
        model.pseudo_inputs, model.idle_input = nn.Hardtanh(0.0, 1.0), parts.pseudo_inputs
    if case.theirs == "FactorVAE":
        model.discriminator = parts.discriminator
    torch.manual_seed(1)
    output = model({"data": parts.x}, **case.arguments)
    return figures(output[case.term], parts, case.has_value)


def stored_figures() -> dict[str, Any]:
    return json.loads(PATH.read_text())
