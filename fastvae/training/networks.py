"""The ready-made networks as classes, which the command line takes by name: ``VAE_conv`` is a call of ``VAE.conv``.

A class path is a name of modules and a class, so a classmethod has none; and it may have no dot.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from torch import nn

from fastvae._extras import extra
from fastvae.models import AE, VAE, VQVAE, VQVAE2, HierarchicalVAE, IndexPrior, SequenceVAE, registry
from fastvae.models.vq_prior import IndexShape
from fastvae.training import checkpoints

with extra("train"):
    from jsonargparse import class_from_function

# The classes that each network is a kind of.
BASES = (AE, VAE, HierarchicalVAE, VQVAE, VQVAE2, IndexPrior, SequenceVAE)


def spelled(name: str) -> str:
    """A network's name as the command line has it."""
    return name.replace(".", "_")


def index_prior(
    vqvae: Path,
    index_shape: IndexShape,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    num_classes: int | None = None,
    dropout: float = 0.0,
) -> IndexPrior:
    """The prior of the codes of a VQ-VAE that has been trained.

    Args:
        vqvae: a checkpoint that fastvae fit wrote.
        index_shape, width, depth, heads, num_classes, dropout: see :class:`fastvae.models.IndexPrior`.
    """
    network = cast("VQVAE | VQVAE2", checkpoints.load(Path(vqvae)).network)
    options: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "num_classes": num_classes, "dropout": dropout}
    return IndexPrior.transformer(network, index_shape, **options)


# A command line has no VQ-VAE at hand but its checkpoint.
MAKERS: dict[str, Callable[..., nn.Module]] = registry.networks() | {"IndexPrior.transformer": index_prior}


def _make_classes() -> dict[str, type[nn.Module]]:
    models = {model.__name__: model for model in registry.MODELS}
    return {spelled(name): class_from_function(make, models[name.partition(".")[0]], name=spelled(name)) for name, make in MAKERS.items()}


# class_from_function looks at the whole stack for each network, which takes seconds inside an import. The stack of a thread is short.
with ThreadPoolExecutor(1) as thread:
    NETWORKS = thread.submit(_make_classes).result()
