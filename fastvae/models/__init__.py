"""Thin models: each composes :mod:`fastvae.functional`, :mod:`fastvae.nn` and plain torch layers.

A class is an objective and takes its modules: ``VAE(encoder, decoder)``. Each ready-made network is a classmethod, named after the network,
which takes its sizes and the options of the class: ``VAE.conv(latent_dim=20, beta=4.0)``, ``ContractiveAE.mlp(weight=0.1)``.
"""

from fastvae.models.ais import log_prob_ais
from fastvae.models.autoencoder import AE, AEOutput
from fastvae.models.beta_tc_vae import BetaTCOutput, BetaTCVAE
from fastvae.models.conditional import CVAE
from fastvae.models.contractive_ae import ContractiveAE
from fastvae.models.deep_vae import DeepVAE
from fastvae.models.denoising_ae import DenoisingAE
from fastvae.models.dip_vae import DIPVAE, DIPOutput
from fastvae.models.factor_vae import FactorVAE, FactorVAEOutput
from fastvae.models.hierarchy import HierarchicalVAE, HierarchyOutput
from fastvae.models.image_vae import ImageVAE
from fastvae.models.info_vae import InfoVAE, InfoVAEOutput
from fastvae.models.iwae import IWAE, IWAEOutput
from fastvae.models.ladder_vae import LadderVAE
from fastvae.models.semi_supervised import SemiSupervisedOutput, SemiSupervisedVAE
from fastvae.models.sequence_vae import SequenceVAE, SequenceVAEOutput
from fastvae.models.sparse_ae import SparseAE
from fastvae.models.stacked_ae import StackedAE
from fastvae.models.vae import VAE, VAEOutput
from fastvae.models.vq_prior import IndexPrior, IndexPriorOutput
from fastvae.models.vqvae import VQVAE, VQVAEOutput
from fastvae.models.vqvae2 import VQVAE2
from fastvae.models.wae import WAE

__all__ = [
    "AE",
    "CVAE",
    "DIPVAE",
    "IWAE",
    "VAE",
    "VQVAE",
    "VQVAE2",
    "WAE",
    "AEOutput",
    "BetaTCOutput",
    "BetaTCVAE",
    "ContractiveAE",
    "DIPOutput",
    "DeepVAE",
    "DenoisingAE",
    "FactorVAE",
    "FactorVAEOutput",
    "HierarchicalVAE",
    "HierarchyOutput",
    "IWAEOutput",
    "ImageVAE",
    "IndexPrior",
    "IndexPriorOutput",
    "InfoVAE",
    "InfoVAEOutput",
    "LadderVAE",
    "SemiSupervisedOutput",
    "SemiSupervisedVAE",
    "SequenceVAE",
    "SequenceVAEOutput",
    "SparseAE",
    "StackedAE",
    "VAEOutput",
    "VQVAEOutput",
    "log_prob_ais",
]
