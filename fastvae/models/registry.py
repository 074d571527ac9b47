"""The ready-made networks by name, and models made from stored recipes."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastvae.models._recipe import Recipe, from_plain, to_plain
from fastvae.models.autoencoder import AE
from fastvae.models.beta_tc_vae import BetaTCVAE
from fastvae.models.conditional import CVAE
from fastvae.models.contractive_ae import ContractiveAE
from fastvae.models.deep_vae import DeepVAE
from fastvae.models.denoising_ae import DenoisingAE
from fastvae.models.dip_vae import DIPVAE
from fastvae.models.factor_vae import FactorVAE
from fastvae.models.image_vae import ImageVAE
from fastvae.models.info_vae import InfoVAE
from fastvae.models.iwae import IWAE
from fastvae.models.ladder_vae import LadderVAE
from fastvae.models.semi_supervised import SemiSupervisedVAE
from fastvae.models.sequence_vae import SequenceVAE
from fastvae.models.sparse_ae import SparseAE
from fastvae.models.stacked_ae import StackedAE
from fastvae.models.vae import VAE
from fastvae.models.vq_prior import IndexPrior
from fastvae.models.vqvae import VQVAE
from fastvae.models.vqvae2 import VQVAE2
from fastvae.models.wae import WAE

MODELS: tuple[type[nn.Module], ...] = (
    *(AE, DenoisingAE, SparseAE, ContractiveAE, StackedAE, WAE),
    *(VAE, ImageVAE, IWAE, BetaTCVAE, DIPVAE, FactorVAE, InfoVAE),
    *(CVAE, SemiSupervisedVAE),
    *(LadderVAE, DeepVAE),
    *(VQVAE, VQVAE2, IndexPrior, SequenceVAE),
)


def networks() -> dict[str, Callable[..., nn.Module]]:
    """Every ready-made network under its name, ``"VAE.conv"``; each takes its sizes and the options of its class."""
    found: dict[str, Callable[..., nn.Module]] = {}
    for model in MODELS:
        for name, method in inspect.getmembers(model, inspect.ismethod):
            if getattr(method, "is_ready_made", False):
                found[f"{model.__name__}.{name}"] = method
    return found


def find_network(name: str) -> Callable[..., nn.Module]:
    """The ready-made network of a name; the error for an unknown one names the nearest that exist."""
    known = networks()
    if name not in known:
        raise ValueError(f"network: got {name!r}, {nearest(name, known)}")
    return known[name]


def nearest(name: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """The end of an error about a name that is not known: the most similar names, or all of them where none is similar."""
    similar = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(similar)}?" if similar else f"takes one of {', '.join(known)}"


def describe(model: nn.Module) -> dict[str, Any]:
    """The recipe of a ready-made model as JSON has it: ``{"network": "VAE.conv", "options": {...}}``.

    Raises:
        ValueError: for a model that no ready-made network made, or with an option that cannot be stored.
    """
    recipe = getattr(model, "recipe", None)
    if not isinstance(recipe, Recipe) or recipe.name not in networks():
        raise ValueError(f"model: got {type(model).__name__} of modules of one's own, takes a model that a ready-made network made")
    return {"network": recipe.name, "options": {name: to_plain(name, value) for name, value in recipe.options.items()}}


def is_description(value: Any) -> bool:
    """Whether something that a file holds has the form of what :func:`describe` gives."""
    return isinstance(value, Mapping) and isinstance(value.get("network"), str) and isinstance(value.get("options"), Mapping)


def build(description: Mapping[str, Any]) -> nn.Module:
    """The model of a description that :func:`describe` gave, with new weights.

    Raises:
        ValueError: for a network or an option that does not exist, with the nearest that do.
    """
    make = find_network(description["network"])
    try:
        return make(**{name: from_plain(value) for name, value in description["options"].items()})
    except TypeError as error:
        raise ValueError(f"network: {description['network']} of this version does not take the stored options: {error}") from error
