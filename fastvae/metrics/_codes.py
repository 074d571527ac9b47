"""Codes of batches: a model as something that writes bits and reads a reconstruction from them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.distributions.divergence import sample_with_kl
from fastvae.models import VAE, VQVAE, VQVAE2, HierarchicalVAE
from fastvae.models._reading import reading
from fastvae.nn import ResidualVectorQuantizer, VectorQuantizer


class Symbols(NamedTuple):
    """The indices of a batch, ``(batch, positions, codebooks)``, and the number of codes of each codebook."""

    indices: Tensor
    num_codes: int


class Coded(NamedTuple):
    """A code makes these of a batch x: its reconstruction in the range of x, in which uint8 means value / 255; the bits of each sample,
    ``(batch,)``; and the indices that it writes, where it writes any."""

    recon: Tensor
    bits: Tensor
    symbols: tuple[Symbols, ...] = ()


Code = Callable[[Tensor], Coded]


def residual_depths(model: VQVAE) -> list[tuple[int, Code]]:
    """The settings of a VQ-VAE with a residual quantizer for :func:`rate_distortion`: its first 1, 2, ... steps, up to all of them."""
    if not isinstance(model.quantizer, ResidualVectorQuantizer):
        raise TypeError(f"model: got a quantizer of {type(model.quantizer).__name__}, takes a VQVAE with a ResidualVectorQuantizer")
    return [(depth, functools.partial(_code_of_vqvae, model, depth=depth)) for depth in range(1, len(model.quantizer.layers) + 1)]


def code_of(model: Any, generator: torch.Generator | None) -> Code:
    """The code of a model; a function that is one already, as it is."""
    if isinstance(model, VAE):
        return functools.partial(_code_of_vae, model, generator=generator)
    if isinstance(model, HierarchicalVAE):
        return functools.partial(_code_of_hierarchy, model, generator=generator)
    if isinstance(model, VQVAE):
        return functools.partial(_code_of_vqvae, model)
    if isinstance(model, VQVAE2):
        return functools.partial(_code_of_vqvae2, model)
    if isinstance(model, nn.Module) or not callable(model):
        raise TypeError(f"models: got {type(model).__name__}, takes a VAE, HierarchicalVAE, VQVAE, VQVAE2 or a function that gives Coded")
    return model


@reading
def _code_of_vae(model: VAE, x: Tensor, generator: torch.Generator | None) -> Coded:
    q = model.encode(x)
    z, kl = sample_with_kl(q, model.prior_distribution(q), reduction="sample", generator=generator)
    return Coded(model.decode_mean(z), kl / math.log(2))


@reading
def _code_of_hierarchy(model: HierarchicalVAE, x: Tensor, generator: torch.Generator | None) -> Coded:
    steps, recon = model.infer(model.encoded(x), lambda _, q, p: sample_with_kl(q, p, reduction="sample", generator=generator))
    kl = torch.stack([step.term for step in steps]).sum(0)
    return Coded(model.likelihood.mean(recon), kl / math.log(2))


def _code_of_vqvae(model: VQVAE, x: Tensor, depth: int | None = None) -> Coded:
    indices = model.encode(x)
    if isinstance(model.quantizer, ResidualVectorQuantizer):
        indices = indices[..., :depth]
    return _coded(model.decode(indices), _symbols(indices, model.quantizer))


def _code_of_vqvae2(model: VQVAE2, x: Tensor) -> Coded:
    top, bottom = model.encode(x)
    return _coded(model.decode((top, bottom)), _symbols(top, model.top_quantizer), _symbols(bottom, model.bottom_quantizer))


def _symbols(indices: Tensor, quantizer: nn.Module) -> Symbols:
    layer = quantizer.layers[0] if isinstance(quantizer, ResidualVectorQuantizer) else quantizer
    if not isinstance(layer, VectorQuantizer):
        raise TypeError(f"quantizer: got {type(layer).__name__}, takes a VectorQuantizer or a ResidualVectorQuantizer")
    has_codebooks = isinstance(quantizer, ResidualVectorQuantizer) or layer.heads > 1
    return Symbols(indices.reshape(len(indices), -1, indices.shape[-1] if has_codebooks else 1), layer.num_codes)


def _coded(recon: Tensor, *symbols: Symbols) -> Coded:
    bits = sum(math.prod(indices.shape[1:]) * math.log2(num_codes) for indices, num_codes in symbols)
    return Coded(recon, recon.new_full((len(recon),), bits, dtype=torch.float64), symbols)
