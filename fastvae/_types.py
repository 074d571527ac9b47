"""The values that string options take, for signatures, where a type checker refuses any other, and their check at run time."""

from collections.abc import Collection
from typing import Literal, TypeVar

BackendName = Literal["cpp", "cuda", "triton", "fallback", "reference"]
Reduction = Literal["none", "sample", "batchmean", "sum", "mean"]
# A mean over elements would weigh pixels against latents, and an evidence lower bound has no value for an element.
BoundReduction = Literal["batchmean", "sum", "sample"]
Likelihood = Literal["bernoulli_logits", "bernoulli", "gaussian"]
# A likelihood learns one value of its parameter, or one a channel; with the last, the decoder gives one for each element.
Extent = Literal["global", "per_channel", "per_element"]
CategoricalData = Literal["integers", "images", "tokens"]
ReconLoss = Literal["mse", "bce_with_logits", "bce"]
SparsePenalty = Literal["kl", "l1"]
NormActivation = Literal["none", "silu", "relu", "gelu"]
# How eps keeps the normalisation of a small vector finite: added to its mean square, or as the least norm it is divided by.
EpsMode = Literal["add", "clamp"]
# The contractive penalty knows the derivatives of these activations.
Activation = Literal["identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "silu", "gelu", "gelu_tanh"]
# The ready-made networks take these activations.
LayerActivation = Literal["identity", "sigmoid", "tanh", "relu", "leaky_relu", "silu"]
Initialisation = Literal["default", "xavier", "he"]
# How an encoder of many vectors gives one code.
Pooling = Literal["token", "mean"]
RecurrentCell = Literal["gru", "lstm"]
JacobianMethodName = Literal["auto", "closed_form", "gram", "projection", "autograd"]
QuantizerGradient = Literal["straight_through", "rotation"]
CodebookUpdate = Literal["ema", "gradient"]
# Where a quantizer of taming-transformers puts an index that is not in use; an integer does too.
UnknownIndex = Literal["random", "extra"]
# Estimators of the importance-weighted bound's gradient, and of the aggregate posterior.
ImportanceGradient = Literal["standard", "doubly_reparameterized"]
AggregateEstimator = Literal["weighted", "stratified"]
Kernel = Literal["imq", "rbf"]
# The covariance that a DIP-VAE draws to I: that of the posterior means, or that of z.
DIPKind = Literal["i", "ii"]
# How a condition enters a network.
Conditioning = Literal["concatenation", "film", "batch_norm", "cross_attention"]
# How the posterior of a ladder's level is made of the encoder's and the prior.
LadderPosterior = Literal["precision_weighted", "plain"]
Precision = Literal["auto", "bfloat16", "float32"]
# A network keeps for the backward pass all that its layers keep, or one input of a normalisation and the convolution behind it.
Memory = Literal["full", "lean"]


Choice = TypeVar("Choice", bound=str)


def check_choice(name: str, value: Choice, choices: Collection[str]) -> Choice:
    """``value``, where it is one of ``choices``; an error that names both where it is not."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, choices))}")
    return value
