"""How the ready-made networks make a layer: its activation, initial weights, dropout and spectral normalisation."""

import math
from dataclasses import dataclass
from typing import TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fastvae._types import Initialisation, LayerActivation, check_choice

# An encoder and its decoder.
Pair = tuple[nn.Sequential, nn.Sequential]
Layer = TypeVar("Layer", bound=nn.Module)

_ACTIVATIONS = dict(zip(get_args(LayerActivation), (nn.Identity, nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.SiLU), strict=True))
# 1 / sqrt(E[silu(a)^2]) for a ~ N(0, 1), by Gauss-Hermite quadrature: the definition by which ReLU has sqrt(2).
_SILU_GAIN = 1.676532


def activation_layers(name: str, value: LayerActivation) -> list[nn.Module]:
    """The activation of the option ``name`` as layers: none for ``"identity"``."""
    check_choice(name, value, _ACTIVATIONS)
    return [] if value == "identity" else [_ACTIVATIONS[value]()]


def activation_gain(activation: LayerActivation) -> float:
    """The factor of initial weights by which an activation keeps the scale of what goes through: that of ``torch.nn.init.calculate_gain``,
    which knows no SiLU."""
    if activation == "silu":
        return _SILU_GAIN
    return nn.init.calculate_gain("linear" if activation == "identity" else activation)


@dataclass(frozen=True)
class Layers:
    """The options of the layers of a network, and the builder of those layers.

    Args:
        activation: of the hidden layers: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"sigmoid"``, ``"tanh"`` or
            ``"identity"``.
        init: of the weights: ``"xavier"``, uniform (Glorot and Bengio, 2010), or ``"he"``, normal by the number of inputs (He et al.,
            2015), both with the gain of the activation and with biases of 0; ``"default"`` leaves them as torch draws them.
        dropout: share of the hidden values that are dropped in training, in [0, 1).
        spectral_norm: divides each weight by its largest singular value (Miyato et al., 2018).

    Raises:
        ValueError: for an option that does not exist.
    """

    activation: LayerActivation = "relu"
    init: Initialisation = "default"
    dropout: float = 0.0
    spectral_norm: bool = False

    def __post_init__(self):
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_choice("init", self.init, get_args(Initialisation))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout!r}, takes a number in [0, 1)")

    def prepare(self, layer: Layer, activation: LayerActivation = "identity") -> Layer:
        """Draws the weights of a linear or convolutional layer anew and normalises them, as the options say.

        Args:
            layer: changed in place, and returned.
            activation: the one that stands behind the layer, whose gain its weights get.
        """
        if self.init != "default":
            _initialise(layer, self.init, activation_gain(activation))
        if self.spectral_norm:
            spectral_norm(layer)
        return layer

    def hidden(self, layer: nn.Module) -> list[nn.Module]:
        """The layer, the activation of hidden layers and dropout."""
        return [self.prepare(layer, self.activation), *self.activations(), *self.dropouts()]

    def last(self, layer: nn.Module, name: str, activation: LayerActivation) -> list[nn.Module]:
        """The layer that gives a network's output, and the activation of the option ``name``."""
        behind = activation_layers(name, activation)
        return [self.prepare(layer, activation), *behind]

    def activations(self) -> list[nn.Module]:
        """The activation of hidden layers; no layer for ``"identity"``."""
        return activation_layers("activation", self.activation)

    def dropouts(self) -> list[nn.Module]:
        """Dropout; no layer where nothing is dropped."""
        return [nn.Dropout(self.dropout)] if self.dropout else []


# The options that networks have by default.
RELU, SILU = Layers("relu"), Layers("silu")


@torch.no_grad()
def _initialise(layer: nn.Module, init: Initialisation, gain: float) -> None:
    weight = cast("Tensor", layer.weight)
    if init == "xavier":
        nn.init.xavier_uniform_(weight, gain)
    elif isinstance(layer, nn.ConvTranspose2d):
        # Its weight has the inputs on dimension 0, and with a stride only one in prod(stride) of them reaches an element of the output.
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="linear")
        weight.mul_(gain * math.sqrt(math.prod(layer.stride)))
    else:
        nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="linear")
        weight.mul_(gain)
    if layer.bias is not None:
        nn.init.zeros_(cast("Tensor", layer.bias))


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """An image's size, of which one number stands for both."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size: got {image_size}, takes integers >= 1")
    return height, width
