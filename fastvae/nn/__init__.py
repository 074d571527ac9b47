"""Modules around :mod:`fastvae.functional`: losses, sampling, schedules, preprocessing and corruption."""

from fastvae.nn.conditioning import (
    Concatenation,
    ConditionalBatchNorm,
    Conditioned,
    ConditionedSequential,
    CrossAttention,
    FiLM,
    conditioned,
)
from fastvae.nn.conditions import ClassCondition, Condition, ConditionEmbedding, SequenceCondition, VectorCondition
from fastvae.nn.corruption import GaussianNoise, Masking, SaltAndPepper
from fastvae.nn.finite_scalar_quantizer import FSQ
from fastvae.nn.group_norm import GroupNormSiLU
from fastvae.nn.lookup_free_quantizer import BSQ, LFQ
from fastvae.nn.losses import BCELoss, BCEWithLogitsLoss, ELBOLoss, GaussianNLL, KLPenalty, LogisticMixtureNLL, MSELoss
from fastvae.nn.norm_act_conv import NormActConv2d, NormActConv3d
from fastvae.nn.preprocessing import MinMaxScaler, StandardScaler
from fastvae.nn.residual_quantizer import ResidualVectorQuantizer
from fastvae.nn.rms_norm import RMSNormSiLU
from fastvae.nn.sampling import Reparameterize, ReparameterizeKL
from fastvae.nn.schedules import CapacitySchedule, CosineSchedule, CyclicalSchedule, LinearSchedule
from fastvae.nn.snake import Snake
from fastvae.nn.upsampling import UpsampleConv2d
from fastvae.nn.vector_quantizer import VectorQuantizer, VQOutput

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CapacitySchedule",
    "ClassCondition",
    "Concatenation",
    "Condition",
    "ConditionEmbedding",
    "ConditionalBatchNorm",
    "Conditioned",
    "ConditionedSequential",
    "CosineSchedule",
    "CrossAttention",
    "CyclicalSchedule",
    "ELBOLoss",
    "FiLM",
    "GaussianNLL",
    "GaussianNoise",
    "GroupNormSiLU",
    "KLPenalty",
    "LinearSchedule",
    "LogisticMixtureNLL",
    "MSELoss",
    "Masking",
    "MinMaxScaler",
    "NormActConv2d",
    "NormActConv3d",
    "RMSNormSiLU",
    "Reparameterize",
    "ReparameterizeKL",
    "ResidualVectorQuantizer",
    "SaltAndPepper",
    "SequenceCondition",
    "Snake",
    "StandardScaler",
    "UpsampleConv2d",
    "VQOutput",
    "VectorCondition",
    "VectorQuantizer",
    "conditioned",
]
