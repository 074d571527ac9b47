"""Models of more parts than an encoder and a decoder, each with its loss as a reader of its paper writes it in plain PyTorch.

The plain loss goes through the very modules of this package's model; only where those are layers that fastvae replaces (group
normalisation with SiLU, upsampling) the plain model has torch's in their place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastvae.models import CVAE, VQVAE, DeepVAE, FactorVAE, LadderVAE, SemiSupervisedVAE, SequenceVAE
from fastvae.models.semi_supervised import UNLABELLED

CLASSES, LABELLED_SHARE = 10, 1 / 8
TOKENS, PAD, BEGIN = 2000, 0, 1
CODES = 512
DRAWS_SEED = 1

Batch = dict[str, Any]


@dataclass(frozen=True)
class Composite:
    """A model, what a training step of it is given, and its loss in plain PyTorch.

    Args:
        make: from the shape of one sample to the model.
        batch: from the model and the data to what a step is given, noise among it.
        plain: from the model and the batch to the loss in plain PyTorch.
        ours: the same by a call of the model.
        size, tiny: of a batch of data, as a case has them.
        num_tokens: the data are integers below it, and in [0, 1] where there is none.
    """

    make: Callable[[tuple[int, ...]], nn.Module]
    batch: Callable[[Any, Tensor], Batch]
    plain: Callable[[Any, Batch], Tensor]
    ours: Callable[[Any, Batch], Tensor] = lambda model, batch: model(**batch).loss
    size: tuple[int, ...] = (128, 1, 28, 28)
    tiny: tuple[int, ...] = (4, 1, 4, 4)
    num_tokens: int | None = None

    def data(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.num_tokens is None:
            return torch.rand(size, dtype=dtype, device=device)
        return torch.randint(BEGIN + 1, self.num_tokens, size, device=device)


def _normal(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * eps


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Gives the KL of each sample to N(0, I)."""
    return -0.5 * torch.sum((1 + logvar - mu.pow(2) - logvar.exp()).flatten(1), dim=1)


def _kl_between(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    """Gives the KL of each sample between two normals."""
    terms = prior_logvar - logvar + (logvar.exp() + (mu - prior_mu).pow(2)) / prior_logvar.exp() - 1
    return 0.5 * terms.flatten(1).sum(1)


def _cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """Gives the cross-entropy of each sample."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def _noise(x: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, device=x.device)


def _labelled(model: CVAE, x: Tensor) -> Batch:
    return {"x": x, "y": torch.randint(CLASSES, (len(x),), device=x.device), "eps": _noise(x, len(x), *model.latent_shape)}


def plain_cvae(model: CVAE, batch: Batch) -> Tensor:
    condition = model.condition(batch["y"])
    mu, logvar = model.encoder(batch["x"], condition).chunk(2, dim=1)
    logits = model.decoder(_normal(mu, logvar, batch["eps"]), condition)
    return (_cross_entropy(logits, batch["x"]) + _kl(mu, logvar)).mean()


def _partly_labelled(model: SemiSupervisedVAE, x: Tensor) -> Batch:
    y = torch.randint(CLASSES, (len(x),), device=x.device)
    y[math.ceil(LABELLED_SHARE * len(x)) :] = UNLABELLED
    return {"x": x, "y": y, "eps": _noise(x, CLASSES, len(x), *model.latent_shape)}


def plain_semi_supervised(model: SemiSupervisedVAE, batch: Batch) -> Tensor:
    """The labelled samples come first, as of two loaders: they pass at their class, the others at all classes."""
    x, y, eps = batch["x"], batch["y"], batch["eps"]
    count = math.ceil(LABELLED_SHARE * len(x))
    log_q = model.classifier(x).log_softmax(1)

    def bound(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        condition = model.condition(y)
        mu, logvar = model.encoder(x, condition).chunk(2, dim=1)
        logits = model.decoder(_normal(mu, logvar, eps), condition)
        return _cross_entropy(logits, x) + _kl(mu, logvar) + math.log(CLASSES)

    known = y[:count]
    labelled = bound(x[:count], known, eps[known, torch.arange(count, device=x.device)])
    classification = F.cross_entropy(log_q[:count], known, reduction="none")
    rest = len(x) - count
    every = torch.arange(CLASSES, device=x.device).repeat_interleave(rest)
    bounds = bound(x[count:].repeat(CLASSES, 1, 1, 1), every, eps[:, count:].flatten(0, 1)).view(CLASSES, rest).T
    unlabelled = (log_q[count:].exp() * (bounds + log_q[count:])).sum(1)
    return (torch.cat([labelled, unlabelled]).sum() + model.alpha * classification.sum()) / len(x)


def _permuted(model: FactorVAE, x: Tensor) -> Batch:
    """With the permutation that the model draws where the seed is the same."""
    eps = _noise(x, len(x), *model.latent_shape)
    torch.manual_seed(DRAWS_SEED)
    return {"x": x, "eps": eps, "order": torch.rand(len(x) // 2, *model.latent_shape, device=x.device).argsort(0)}


def factor_loss(model: FactorVAE, batch: Batch) -> Tensor:
    """The discriminator has a loss of its own, whose gradient goes to its weights alone."""
    torch.manual_seed(DRAWS_SEED)
    output = model(batch["x"], batch["eps"])
    return output.loss + output.discriminator_loss


def plain_factor(model: FactorVAE, batch: Batch) -> Tensor:
    """Both losses in one backward pass, each without a gradient to the weights of the other's network."""
    x = batch["x"]
    mu, logvar = model.encoder(x).chunk(2, dim=1)
    z = _normal(mu, logvar, batch["eps"])
    fixed = {name: parameter.detach() for name, parameter in model.discriminator.named_parameters()}
    judged = functional_call(model.discriminator, fixed, (z,))
    total_correlation = (judged[:, 0] - judged[:, 1]).mean()
    joint, others = z.detach().tensor_split(2)
    permuted = others.gather(0, batch["order"])
    given = model.discriminator(torch.cat([joint, permuted]))
    discriminator_loss = 0.5 * (-given[: len(joint)].log_softmax(1)[:, 0].mean() - given[len(joint) :].log_softmax(1)[:, 1].mean())
    loss = (_cross_entropy(model.decoder(z), x) + _kl(mu, logvar)).mean() + model.gamma * total_correlation
    return loss + discriminator_loss


def _levels(model: LadderVAE | DeepVAE, x: Tensor) -> Batch:
    with torch.no_grad():
        posteriors = model.encode(x)
    return {"x": x, "eps": tuple(torch.randn_like(q.mu) for q in posteriors)}


def plain_hierarchy(model: LadderVAE | DeepVAE, batch: Batch) -> Tensor:
    """Serves a ladder and a deep VAE, whose levels know how prior, posterior and state follow from one another."""
    x = batch["x"]
    state, kl = model.started(len(x)), x.new_zeros(len(x))
    for level, feature, eps in zip(model.levels, model.encoded(x), batch["eps"], strict=True):
        prior = level.prior(state)
        posterior = level.posterior(state, feature, prior)
        kl = kl + _kl_between(posterior.mu, posterior.logvar, prior.mu, prior.logvar)
        state = level.merge(state, _normal(posterior.mu, posterior.logvar, eps))
    return (_cross_entropy(model.decoder(state), x) + kl).mean()


def plain_vqvae(model: VQVAE, batch: Batch) -> Tensor:
    x = batch["x"]
    z, codebook = model.encoder(x), model.quantizer.codebook.view(CODES, -1)
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    with torch.no_grad():
        distance = rows.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * rows @ codebook.T
        indices = distance.argmin(1)
    codes = F.embedding(indices, codebook)
    vq_loss = F.mse_loss(codes, rows.detach()) + 0.25 * F.mse_loss(codes.detach(), rows)
    quantized = (rows + (codes - rows).detach()).view(len(x), *z.shape[2:], -1).permute(0, 3, 1, 2)
    return F.mse_loss(model.decoder(quantized), x) / model.data_variance + vq_loss


def _sentences(model: SequenceVAE, tokens: Tensor) -> Batch:
    return {"tokens": tokens, "eps": torch.randn(len(tokens), *model.latent_shape, device=tokens.device)}


def plain_sequence(model: SequenceVAE, batch: Batch) -> Tensor:
    tokens = batch["tokens"]
    mu, logvar = model.encoder(tokens).chunk(2, dim=1)
    begun = torch.cat([torch.full_like(tokens[:, :1], BEGIN), tokens[:, :-1]], dim=1)
    logits = model.decoder(_normal(mu, logvar, batch["eps"]), begun)
    nats = F.cross_entropy(logits.mT, tokens, ignore_index=PAD, reduction="sum") / len(tokens)
    return nats + _kl(mu, logvar).mean()


COMPOSITES = {
    "cvae": Composite(lambda shape: CVAE.mlp(shape, num_classes=CLASSES), _labelled, plain_cvae),
    "semi_supervised_vae": Composite(
        lambda shape: SemiSupervisedVAE.mlp(shape, num_classes=CLASSES), _partly_labelled, plain_semi_supervised
    ),
    "factor_vae": Composite(FactorVAE.mlp, _permuted, plain_factor, factor_loss),
    "ladder_vae": Composite(LadderVAE.mlp, _levels, plain_hierarchy),
    "deep_vae": Composite(
        lambda shape: DeepVAE.residual(shape[1], shape[0], (32, 64)), _levels, plain_hierarchy, size=(16, 3, 32, 32), tiny=(2, 3, 4, 4)
    ),
    "vqvae": Composite(
        lambda shape: VQVAE.conv(shape[0], num_codes=CODES, update="gradient", data_variance=1 / math.prod(shape)),
        lambda model, x: {"x": x},
        plain_vqvae,
        size=(32, 3, 32, 32),
        tiny=(2, 3, 8, 8),
    ),
    "sequence_vae": Composite(
        lambda shape: SequenceVAE.recurrent(TOKENS, word_dropout=0.0),
        _sentences,
        plain_sequence,
        size=(64, 20),
        tiny=(3, 5),
        num_tokens=TOKENS,
    ),
}


def made(composite: Composite, x: Tensor) -> tuple[Any, Batch]:
    """The model and what a step of it is given: the same weights and noise each time."""
    torch.manual_seed(0)
    model = composite.make(tuple(x.shape[1:])).to(x.device)
    return model, composite.batch(model, x)
