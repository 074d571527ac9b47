"""The ladder VAE (Sønderby et al., *Ladder Variational Autoencoders*, 2016)."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from fastvae._types import Initialisation, LadderPosterior, LayerActivation, check_choice
from fastvae.distributions.normal import DiagonalNormal
from fastvae.distributions.prior import check_shape
from fastvae.models import networks
from fastvae.models._recipe import ready_made
from fastvae.models._top_down import Level, split_normal
from fastvae.models.hierarchy import HierarchicalVAE, chosen_likelihood


class LadderLevel(Level):
    """A level whose state is the z of the level above.

    Args:
        network: gives the prior's mu and log variance on dimension 1 for a state.
        posterior: see :class:`LadderVAE`.
    """

    def __init__(self, network: nn.Module, posterior: LadderPosterior):
        super().__init__()
        self.network, self.combination = network, posterior

    def prior(self, state: Tensor) -> DiagonalNormal:
        return split_normal("priors", self.network(state))

    def posterior(self, state: Tensor, feature: Tensor, p: DiagonalNormal) -> DiagonalNormal:
        q = split_normal("encoder", feature)
        return q if self.combination == "plain" or q.mu.shape != p.mu.shape else _precision_weighted(q, p)

    def merge(self, state: Tensor, z: Tensor) -> Tensor:
        return z

    def extra_repr(self) -> str:
        return f"posterior={self.combination!r}"


def _precision_weighted(a: DiagonalNormal, b: DiagonalNormal) -> DiagonalNormal:
    r"""The normalized product of two normals: precision :math:`\sigma_a^{-2} + \sigma_b^{-2}`, mean weighted by the precisions."""
    return DiagonalNormal(torch.lerp(b.mu, a.mu, (b.logvar - a.logvar).sigmoid()), -torch.logaddexp(-a.logvar, -b.logvar))


class LadderEncoder(nn.Module):
    """The deterministic bottom-up pass: each stage continues from the one below, and a code is read off each.

    Args:
        stages: from the data up.
        codes: of each stage, mu and log variance on dimension 1.
    """

    def __init__(self, stages: Iterable[nn.Module], codes: Iterable[nn.Module]):
        super().__init__()
        self.stages, self.codes = nn.ModuleList(stages), nn.ModuleList(codes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The codes, from the top."""
        features = itertools.accumulate(self.stages, lambda below, stage: stage(below), initial=x)
        codes = [code(feature) for code, feature in zip(self.codes, itertools.islice(features, 1, None), strict=True)]
        return tuple(reversed(codes))


AnyLadderVAE = TypeVar("AnyLadderVAE", bound="LadderVAE")


class LadderVAE(HierarchicalVAE):
    r"""A hierarchy of latents in which each depends on the one above, :math:`p(z_L) \prod_l p(z_l | z_{l+1})\, p(x | z_1)`.

    The top has the prior N(0, I) and the posterior :math:`\hat q` that the encoder gives. Below, with ``"precision_weighted"``, the
    posterior is the encoder's estimate combined with the prior:

    .. math:: \sigma_q^{-2} = \hat\sigma^{-2} + \sigma_p^{-2}, \quad
        \mu_q = \sigma_q^2\, (\hat\mu\, \hat\sigma^{-2} + \mu_p\, \sigma_p^{-2})

    The paper's warm-up is ``beta=LinearSchedule(...)``.

    Args:
        encoder: the bottom-up pass, such as :class:`LadderEncoder`: a tensor a level from the top, mu and log variance on dimension 1.
        priors: from the second level on: networks that give mu and log variance on dimension 1 for the z above.
        decoder: gives what the likelihood takes for the z of the last level.
        top_shape: shape of one z of the top, an integer for a vector.
        posterior: ``"precision_weighted"``, or ``"plain"`` for the encoder's estimate alone, :math:`q(z_l | x)`.
        options: ``likelihood``, ``beta`` and ``free_bits``, see :class:`~fastvae.models.HierarchicalVAE`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        priors: Iterable[nn.Module],
        decoder: nn.Module,
        top_shape: int | Sequence[int],
        *,
        posterior: LadderPosterior = "precision_weighted",
        **options,
    ):
        check_choice("posterior", posterior, get_args(LadderPosterior))
        size, *rest = check_shape("top_shape", top_shape)
        # Zeros in place of a state are mean and log variance of N(0, I).
        top = LadderLevel(nn.Identity(), "plain")
        super().__init__(
            encoder, [top, *(LadderLevel(prior, posterior) for prior in priors)], decoder, torch.zeros(2 * size, *rest), **options
        )

    @classmethod
    @ready_made
    def mlp(
        cls: type[AnyLadderVAE],
        data_shape: int | Sequence[int] = (1, 28, 28),
        hidden: Sequence[int] = (512, 256),
        latent_dims: Sequence[int] = (32, 16),
        *,
        activation: LayerActivation = "leaky_relu",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        **options,
    ) -> AnyLadderVAE:
        """One hidden layer a level on the way up and on the way down; the decoder gives logits.

        The paper's network has ``hidden=(512, 256, 128, 64, 32)`` and ``latent_dims=(64, 32, 16, 8, 4)``, two hidden layers a level and
        batch normalisation.

        Args:
            data_shape: shape of one ``x``, an integer for a vector.
            hidden: units of the hidden layer of each level, from the data up.
            latent_dims: size of z of each level, from the data up.
            activation, init, dropout, spectral_norm: of all layers, see :class:`fastvae.models.networks.Layers`.
            options: those of the class.
        """
        if len(hidden) != len(latent_dims):
            raise ValueError(f"latent_dims: got {len(latent_dims)} levels, takes as many as hidden has, {len(hidden)}")
        layers = networks.Layers(activation, init, dropout, spectral_norm)
        below, stages, codes, priors = data_shape, [], [], []
        for units, dim in zip(hidden, latent_dims, strict=True):
            encoder, _ = networks.mlp(below, (units,), dim, code_dim=2 * dim, layers=layers)
            stages.append(encoder[:-1])
            codes.append(encoder[-1])
            below = units
        for units, dim, above in zip(hidden, latent_dims, latent_dims[1:], strict=False):
            priors.append(networks.mlp(dim, (units,), above, outputs=2, layers=layers)[1])
        outputs = chosen_likelihood(options).parameters_per_element
        _, decoder = networks.mlp(data_shape, hidden[:1], latent_dims[0], outputs=outputs, layers=layers)
        return cls(LadderEncoder(stages, codes), reversed(priors), decoder, latent_dims[-1], **options)
