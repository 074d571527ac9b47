"""Thin models: each composes :mod:`fastvae.functional`, :mod:`fastvae.nn` and plain torch layers.

A class is an objective and takes its modules: ``VAE(encoder, decoder)``. Each ready-made network is a classmethod, named after the network,
which takes its sizes and the options of the class: ``VAE.conv(latent_dim=20, beta=4.0)``, ``ContractiveAE.mlp(weight=0.1)``.
"""

from fastvae.models.autoencoder import AE, AEOutput, ContractiveAE, DenoisingAE, SparseAE, StackedAE
from fastvae.models.image_vae import ImageVAE
from fastvae.models.sequence_vae import SequenceVAE, SequenceVAEOutput
from fastvae.models.vae import VAE, VAEOutput
from fastvae.models.vq_prior import IndexPrior, IndexPriorOutput
from fastvae.models.vqvae import VQVAE, VQVAE2, VQVAEOutput

__all__ = [
    "AE",
    "VAE",
    "VQVAE",
    "VQVAE2",
    "AEOutput",
    "ContractiveAE",
    "DenoisingAE",
    "ImageVAE",
    "IndexPrior",
    "IndexPriorOutput",
    "SequenceVAE",
    "SequenceVAEOutput",
    "SparseAE",
    "StackedAE",
    "VAEOutput",
    "VQVAEOutput",
]
