"""The ready-made networks as classes, which the command line takes by name: ``VAE_conv`` is a call of ``VAE.conv``.

A class path is a name of modules and a class, so a classmethod has none; and it may have no dot.
"""

from torch import nn

from fastvae._extras import extra
from fastvae.models import AE, VAE, VQVAE, VQVAE2, HierarchicalVAE, registry

with extra("train"):
    from jsonargparse import class_from_function

# The classes that each network is a kind of.
BASES = (AE, VAE, HierarchicalVAE, VQVAE, VQVAE2)


def spelled(name: str) -> str:
    """A network's name as the command line has it."""
    return name.replace(".", "_")


def _make_classes() -> dict[str, type[nn.Module]]:
    models = {model.__name__: model for model in registry.MODELS}
    return {
        spelled(name): class_from_function(make, models[name.partition(".")[0]], name=spelled(name))
        for name, make in registry.networks().items()
    }


NETWORKS = _make_classes()
