"""Modules around :mod:`fastvae.functional`: losses, sampling and schedules."""

from fastvae.nn.losses import BCELoss, BCEWithLogitsLoss, GaussianNLL, KLPenalty, MSELoss, VAELoss
from fastvae.nn.sampling import Reparameterize
from fastvae.nn.schedules import CapacitySchedule, CosineSchedule, CyclicalSchedule, LinearSchedule

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CapacitySchedule",
    "CosineSchedule",
    "CyclicalSchedule",
    "GaussianNLL",
    "KLPenalty",
    "LinearSchedule",
    "MSELoss",
    "Reparameterize",
    "VAELoss",
]
