"""The ready-made encoders and decoders, which all models share, and the layers to compose others of.

:func:`mlp`, :func:`conv`, :func:`strided_conv` and :func:`transformer` give a pair, the encoder and the decoder. Each is a sequence of
stages; the decoder's stages undo the encoder's from the last to the first, so that a stage and its counterpart are an autoencoder of their
own. :class:`Layers` says how their layers are made: activation, initial weights, dropout and spectral normalisation.
"""

from fastvae.models.networks.convolutional import conv, strided_conv
from fastvae.models.networks.layers import Layers
from fastvae.models.networks.mlp import mlp
from fastvae.models.networks.recurrent import Recurrent, TokenDecoder, TokenEncoder
from fastvae.models.networks.residual import Attention, ResidualBlock, ResidualDecoder, ResidualEncoder
from fastvae.models.networks.transformer import KeyValueCache, TransformerBlock, transformer

__all__ = [
    "Attention",
    "KeyValueCache",
    "Layers",
    "Recurrent",
    "ResidualBlock",
    "ResidualDecoder",
    "ResidualEncoder",
    "TokenDecoder",
    "TokenEncoder",
    "TransformerBlock",
    "conv",
    "mlp",
    "strided_conv",
    "transformer",
]
