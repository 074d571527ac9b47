"""Training steps (forward, backward, optimizer) of the models of the VAE family, most of them on an MLP of 784-400-20 units.

The baselines are the same objectives as a reader of the papers writes them in plain PyTorch, and pythae's models around the same network,
where pythae is installed. All have the same weights, data and noise. Of the samples of the semi-supervised step one in eight has a label;
plain PyTorch takes those at their class alone, fastvae takes every sample at all classes, so that no shape depends on the labels.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.composite_models import CODES, COMPOSITES, Composite, made
from benchmarks.registry import Case, Inputs, Operation, Provider, Results, Unavailable
from fastvae.distributions import StandardPrior, VampPrior
from fastvae.distributions.normal import StandardNormal
from fastvae.models import DIPVAE, IWAE, VAE, WAE, BetaTCVAE, InfoVAE, networks
from fastvae.training.plain_torch import with_plain_layers

SHAPE, HIDDEN, DIM = (1, 28, 28), (400,), 20
SAMPLES, COMPONENTS, DATASET_SIZE = 5, 50, 60_000
DRAWS_SEED = 1
MMD_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Parts:
    """The network of a step, its data and its noise: ``draws`` are those of the prior, ``pseudo`` the pseudo-inputs of a VampPrior."""

    encoder: nn.Module
    decoder: nn.Module
    x: Tensor
    eps: Tensor
    draws: Tensor
    pseudo: nn.Parameter

    def parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.decoder.parameters(), self.pseudo]


def make_parts(inputs: Inputs, num_samples: int | None, output: str) -> Parts:
    torch.manual_seed(0)
    x = inputs.others["x"]
    encoder, decoder = networks.mlp(SHAPE, HIDDEN, DIM, code_dim=2 * DIM, output=output)
    pseudo = nn.Parameter(torch.rand(COMPONENTS, *SHAPE, device=x.device))
    eps = torch.randn(*([] if num_samples is None else [num_samples]), len(x), DIM)
    torch.manual_seed(DRAWS_SEED)
    draws = torch.randn(len(x), DIM, device=x.device)
    return Parts(encoder.to(x.device), decoder.to(x.device), x, eps.to(x.device), draws, pseudo)


def _encoded(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    mu, logvar = parts.encoder(parts.x).chunk(2, dim=1)
    return mu, logvar, mu + torch.exp(0.5 * logvar) * parts.eps


def _cross_entropy(parts: Parts, z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(parts.decoder(z), parts.x, reduction="sum") / len(parts.x)


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1).mean()


def plain_vae(parts: Parts) -> Tensor:
    mu, logvar, z = _encoded(parts)
    return _cross_entropy(parts, z) + _kl(mu, logvar)


def plain_iwae(parts: Parts) -> Tensor:
    mu, logvar, z = _encoded(parts)
    logits = parts.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    target = parts.x.expand_as(logits)
    log_px = -F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(2).sum(-1)
    log_q = Normal(mu, torch.exp(0.5 * logvar), validate_args=False).log_prob(z).sum(-1)
    log_p = Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(-1)
    return -(torch.logsumexp(log_px + log_p - log_q, 0) - math.log(len(z))).mean()


def plain_beta_tc(parts: Parts) -> Tensor:
    mu, logvar, z = _encoded(parts)
    scale = torch.exp(0.5 * logvar)
    log_q = Normal(mu, scale, validate_args=False).log_prob(z).sum(1)
    log_p = Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(1)
    pairs = Normal(mu[None], scale[None], validate_args=False).log_prob(z[:, None])
    log_size = math.log(len(z) * DATASET_SIZE)
    log_joint = torch.logsumexp(pairs.sum(2), 1) - log_size
    log_product = (torch.logsumexp(pairs, 1) - log_size).sum(1)
    terms = (log_q - log_joint) + 6.0 * (log_joint - log_product) + (log_product - log_p)
    return _cross_entropy(parts, z) + terms.mean()


def plain_dip(parts: Parts) -> Tensor:
    mu, logvar, z = _encoded(parts)
    covariance = torch.cov(mu.T, correction=0) + torch.diag(logvar.exp().mean(0))
    variance = covariance.diagonal()
    off_diagonal = covariance - torch.diag(variance)
    penalty = 10.0 * off_diagonal.pow(2).sum() + 10.0 * (variance - 1).pow(2).sum()
    return _cross_entropy(parts, z) + _kl(mu, logvar) + penalty


def _mmd(z: Tensor, draws: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = (a[:, None] - b[None]).pow(2).sum(-1)
        return sum(2 * DIM * scale / (2 * DIM * scale + distance) for scale in MMD_SCALES)

    n = len(z)
    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(z, z), kernel(draws, draws)))
    return within / (n * (n - 1)) - 2 * kernel(z, draws).mean()


def plain_info(parts: Parts) -> Tensor:
    mu, logvar, z = _encoded(parts)
    return _cross_entropy(parts, z) + 0.5 * _kl(mu, logvar) + (0.5 + 10.0 - 1) * _mmd(z, parts.draws)


def plain_wae(parts: Parts) -> Tensor:
    z = parts.encoder(parts.x)[:, :DIM]
    return F.mse_loss(parts.decoder(z), parts.x, reduction="sum") / len(z) + 100.0 * _mmd(z, parts.draws)


def plain_vamp(parts: Parts) -> Tensor:
    mu, logvar, z = _encoded(parts)
    prior_mu, prior_logvar = parts.encoder(parts.pseudo.clamp(0, 1)).chunk(2, dim=1)
    components = Normal(prior_mu, torch.exp(0.5 * prior_logvar), validate_args=False).log_prob(z[:, None]).sum(-1)
    log_p = torch.logsumexp(components, 1) - math.log(COMPONENTS)
    log_q = Normal(mu, torch.exp(0.5 * logvar), validate_args=False).log_prob(z).sum(1)
    return _cross_entropy(parts, z) + (log_q - log_p).mean()


class GivenNormal(StandardNormal):
    """N(0, I), whose draws are given."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.origin


class GivenPrior(StandardPrior):
    """The prior that draws the same z in each step."""

    def __init__(self, draws: Tensor):
        super().__init__(draws.shape[1])
        self.draws = draws

    def forward(self, encode: Any = None) -> StandardNormal:
        return GivenNormal(self.draws)


class MeanOnly(nn.Module):
    """The encoder of a deterministic autoencoder: the means of a VAE's."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)[:, :DIM]


def _vamp(parts: Parts) -> VAE:
    prior = VampPrior(DIM, SHAPE, COMPONENTS)
    prior.pseudo_inputs = parts.pseudo
    return VAE(parts.encoder, parts.decoder, prior=prior)


def _step(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Operation:
    """A step of Adam; the norm of the gradient stands for it in the comparison."""
    optimizer = torch.optim.Adam(parameters, 1e-4)

    def operation():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return value, torch.nn.utils.get_total_norm(gradients)

    return operation


def _compiled(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    try:
        return torch.compile(loss)
    except RuntimeError as error:
        raise Unavailable(f"torch.compile does not work here: {error}") from error


@dataclass(frozen=True)
class Model:
    """A model as plain PyTorch, this package and pythae have it.

    Args:
        plain, ours: from the parts to the loss, and to the model.
        theirs, config, arguments: pythae's class, its configuration and the arguments of its call; none where pythae has no such model, or
            has it with an error.
        num_samples: of z for each x.
        output: the activation of the decoder.
        same_loss: whether pythae's loss has the value of the bound, and not its gradient alone.
    """

    plain: Callable[[Parts], Tensor]
    ours: Callable[[Parts], nn.Module]
    theirs: str | None = None
    config: tuple[tuple[str, Any], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    num_samples: int | None = None
    output: str = "identity"
    same_loss: bool = True

    def parts(self, inputs: Inputs) -> Parts:
        return make_parts(inputs, self.num_samples, self.output)

    def eager(self, inputs: Inputs) -> Operation:
        parts = self.parts(inputs)
        return _step(parts.parameters(), lambda: self.plain(parts))

    def compiled(self, inputs: Inputs) -> Operation:
        parts = self.parts(inputs)
        return _step(parts.parameters(), _compiled(lambda: self.plain(parts)))

    def fastvae(self, inputs: Inputs) -> Operation:
        parts = self.parts(inputs)
        model = self.ours(parts).to(parts.x.device)
        noise = {} if isinstance(model, WAE) else {"eps": parts.eps}
        return _step(parts.parameters(), lambda: model(parts.x, **noise).loss)

    def pythae(self, inputs: Inputs) -> Operation:
        if importlib.util.find_spec("pythae") is None:
            raise Unavailable("pythae is not installed")
        parts = self.parts(inputs)
        model = _pythae_model(self, parts)
        batch = {"data": parts.x}

        def loss() -> Tensor:
            # It draws the prior's z in each call.
            torch.manual_seed(DRAWS_SEED)
            return model(batch, **dict(self.arguments)).loss

        return _step(parts.parameters(), loss)


def _pythae_model(model: Model, parts: Parts) -> nn.Module:
    """pythae's model around the network of the parts, with their noise."""
    import pythae.models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.layers = parts.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mu, logvar = self.layers(x).chunk(2, dim=1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.layers = parts.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            output = self.layers(z)
            return ModelOutput(reconstruction=output if model.output == "sigmoid" else output.sigmoid())

    config = getattr(pythae.models, f"{model.theirs}{'_' if '_' in model.theirs else ''}Config")
    loss = {"reconstruction_loss": "bce"} if model.output == "identity" else {}
    made = getattr(pythae.models, model.theirs)(
        model_config=config(input_dim=SHAPE, latent_dim=DIM, **loss, **dict(model.config)), encoder=Encoder(), decoder=Decoder()
    )
    eps = parts.eps if model.num_samples is None else parts.eps.transpose(0, 1)
    made._sample_gauss = lambda mu, std: (mu + eps * std, eps)
    if model.theirs == "VAMP":
        made.pseudo_inputs, made.idle_input = nn.Hardtanh(0.0, 1.0), parts.pseudo
    return made.to(parts.x.device)


MODELS = {
    "vae": Model(plain_vae, lambda parts: VAE(parts.encoder, parts.decoder, DIM), "VAE"),
    "vamp_prior": Model(plain_vamp, _vamp, "VAMP", (("number_components", COMPONENTS),)),
    "iwae": Model(
        plain_iwae,
        lambda parts: IWAE(parts.encoder, parts.decoder, DIM, num_samples=SAMPLES),
        "IWAE",
        (("number_samples", SAMPLES),),
        num_samples=SAMPLES,
        same_loss=False,
    ),
    "beta_tc_vae": Model(
        plain_beta_tc,
        lambda parts: BetaTCVAE(parts.encoder, parts.decoder, DIM, dataset_size=DATASET_SIZE, estimator="weighted"),
        "BetaTCVAE",
        (("alpha", 1.0), ("beta", 6.0), ("gamma", 1.0), ("use_mss", False)),
        (("dataset_size", DATASET_SIZE),),
    ),
    "dip_vae": Model(plain_dip, lambda parts: DIPVAE(parts.encoder, parts.decoder, DIM)),
    "info_vae": Model(
        plain_info,
        lambda parts: InfoVAE(parts.encoder, parts.decoder, prior=GivenPrior(parts.draws), alpha=0.5, weight=10.0),
        "INFOVAE_MMD",
        (("alpha", 0.5), ("lbd", 10.0), ("kernel_choice", "imq")),
    ),
    "wae": Model(
        plain_wae,
        lambda parts: WAE(MeanOnly(parts.encoder), parts.decoder, prior=GivenPrior(parts.draws)),
        "WAE_MMD",
        (("reg_weight", 100.0), ("kernel_choice", "imq")),
        output="sigmoid",
    ),
}


def flops(inputs: Inputs) -> float:
    """The operations of the matrix products of one pass of the batch through the network, forward and backward."""
    units = math.prod(SHAPE)
    return 3.0 * 2 * len(inputs.others["x"]) * HIDDEN[0] * (2 * units + 3 * DIM)


def _gradient_alone(results: Results, inputs: Inputs) -> Results:
    return {"gradient norm": results["gradient norm"]}


def _as_they_are(results: Results, inputs: Inputs) -> Results:
    return results


def _case(name: str, model: Model) -> Case:
    providers: dict[str, Provider] = {"eager": model.eager, "compile": model.compiled, "fastvae": model.fastvae}
    if model.theirs is not None:
        providers["pythae"] = model.pythae
    return Case(
        family="models",
        name=f"{name}_step",
        size=(128, *SHAPE),
        tiny=(4, *SHAPE),
        setup=lambda size, dtype, device: Inputs({}, {"x": torch.rand(size, dtype=dtype, device=device)}),
        providers=providers,
        outputs=("loss", "gradient norm"),
        work=flops,
        unit="FLOP",
        compare=_as_they_are if model.same_loss else _gradient_alone,
    )


def composite_step(composite: Composite) -> Provider:
    def provide(inputs: Inputs) -> Operation:
        model, batch = made(composite, inputs.others["x"])
        return _step(list(model.parameters()), lambda: composite.ours(model, batch))

    return provide


Change = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def plain_composite_step(composite: Composite, change: Change = lambda loss: loss) -> Provider:
    """A step in plain PyTorch; ``change`` compiles its loss."""

    def provide(inputs: Inputs) -> Operation:
        model, batch = made(composite, inputs.others["x"])
        model = with_plain_layers(model)
        return _step(list(model.parameters()), change(lambda: composite.plain(model, batch)))

    return provide


def pythae_vqvae(inputs: Inputs) -> Operation:
    """pythae's VQ-VAE around the network of the composite, with its codebook."""
    if importlib.util.find_spec("pythae") is None:
        raise Unavailable("pythae is not installed")
    from pythae.models import VQVAE, VQVAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    ours, batch = made(COMPOSITES["vqvae"], inputs.others["x"])

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.layers = ours.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            return ModelOutput(embedding=self.layers(x))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.layers = ours.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z))

    config = VQVAEConfig(input_dim=tuple(batch["x"].shape[1:]), latent_dim=ours.quantizer.dim, num_embeddings=CODES)
    theirs = VQVAE(config, encoder=Encoder(), decoder=Decoder()).to(batch["x"].device)
    theirs.quantizer.embeddings.weight = ours.quantizer.codebook
    return _step(list(ours.parameters()), lambda: theirs({"data": batch["x"]}).loss)


def composite_flops(composite: Composite, inputs: Inputs) -> float:
    """The operations of the matrix products and convolutions of a step."""
    model, batch = made(composite, inputs.others["x"])
    with FlopCounterMode(display=False) as counter:
        composite.ours(model, batch).backward()
    return counter.get_total_flops()


def _composite_case(name: str, composite: Composite) -> Case:
    providers = {
        "eager": plain_composite_step(composite),
        "compile": plain_composite_step(composite, _compiled),
        "fastvae": composite_step(composite),
    }
    return Case(
        family="models",
        name=f"{name}_step",
        size=composite.size,
        tiny=composite.tiny,
        setup=lambda size, dtype, device: Inputs({}, {"x": composite.data(size, dtype, device)}),
        providers=providers | ({"pythae": pythae_vqvae} if name == "vqvae" else {}),
        outputs=("loss", "gradient norm"),
        work=partial(composite_flops, composite),
        unit="FLOP",
    )


CASES = (
    *(_case(name, model) for name, model in MODELS.items()),
    *(_composite_case(name, composite) for name, composite in COMPOSITES.items()),
)
