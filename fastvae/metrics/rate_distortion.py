"""Points of the rate-distortion curve of models (Alemi et al., *Fixing a Broken ELBO*, 2018)."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.functional._checks import check_shape
from fastvae.metrics._codes import Code, Coded, Symbols, code_of, residual_depths
from fastvae.metrics.codebook_usage import CodebookUsage

__all__ = ["Coded", "RateDistortion", "Symbols", "rate_distortion", "residual_depths"]


class RateDistortion(NamedTuple):
    """A point of the curve: rates in bits per dimension of the data, mean squared error per dimension, and PSNR in dB.

    ``entropy_rate`` is the rate of a code that knows how frequent each index is, and ``None`` where there are no indices.
    """

    setting: Any
    rate: float
    entropy_rate: float | None
    mse: float
    psnr: float


def rate_distortion(
    models: Iterable[tuple[Any, nn.Module | Code]],
    data: Iterable[Any],
    *,
    data_range: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[RateDistortion]:
    r"""Rate against distortion for each of several models, or several settings of one.

    Of a VAE the rate is :math:`KL / (D \ln 2)`, the mean over the data for D dimensions, and the distortion that of one **sampled** z for
    each x: bits-back coding reaches this rate for a sample, and no code does for the posterior's mean. Of a VQ-VAE the rate is
    :math:`n \log_2 K / D` for n indices of K codes in each sample. ``entropy_rate`` puts the entropy of each codebook's indices over the
    data in place of :math:`\log_2 K`. PSNR is :math:`10 \log_{10}(R^2 / MSE)` of the mean squared error over all data.

    Args:
        models: pairs of a setting, which is handed through, and a model: a ``VAE`` or ``HierarchicalVAE`` without a condition, a ``VQVAE``,
            a ``VQVAE2``, or a function from a batch to :class:`Coded`. :func:`residual_depths` gives the pairs of a residual quantizer.
        data: batches, each a tensor ``(batch, ...)`` or a sequence that begins with one, on the model's device; gone through once for each
            model. uint8 means value / 255.
        data_range: R, the width of the data's range.
        generator: of the noise of all VAEs. Batches of other sizes have other noise, so their numbers agree to its standard error.

    Raises:
        TypeError: for another model.
        ValueError: for no data, a reconstruction of another shape than the data, or a number of bits that is not finite.
    """
    if not data_range > 0:
        raise ValueError(f"data_range: got {data_range!r}, takes a number > 0")
    return [_measure(setting, code_of(model, generator), data, data_range) for setting, model in models]


class _Sums:
    """Sums over the batches of one model, in float64."""

    def __init__(self):
        self.samples, self.dimensions, self.bits, self.squared_error = 0, 0, 0.0, 0.0
        self.usages: list[tuple[int, CodebookUsage]] = []

    def add(self, x: Tensor, coded: Coded) -> None:
        check_shape("recon", coded.recon, x.shape, "the shape of the data")
        check_shape("bits", coded.bits, x.shape[:1], "one number for each sample")
        if not coded.bits.isfinite().all():
            raise ValueError("bits: got values that are not finite")
        self.samples += len(x)
        self.dimensions += x.numel()
        self.bits += coded.bits.double().sum().item()
        self.squared_error += (coded.recon.double() - x).square().sum().item()
        if not self.usages:
            self.usages = [(s.indices.shape[1], CodebookUsage(s.num_codes, s.indices.shape[2]).to(x.device)) for s in coded.symbols]
        for (_, usage), symbols in zip(self.usages, coded.symbols, strict=True):
            usage.update(symbols.indices)

    def entropy(self) -> float | None:
        """The bits of all samples at the entropy of their indices."""
        if not self.usages:
            return None
        return self.samples * sum(positions * usage.compute().entropy.sum().item() for positions, usage in self.usages)


def _measure(setting: Any, code: Code, data: Iterable[Any], data_range: float) -> RateDistortion:
    sums = _Sums()
    for batch in data:
        x = batch if isinstance(batch, Tensor) else batch[0]
        sums.add(x.double() / 255 if x.dtype == torch.uint8 else x.double(), code(x))
    if sums.dimensions == 0:
        raise ValueError(f"data: gave nothing for the setting {setting!r}, takes batches that can be gone through once for each model")
    mse, entropy = sums.squared_error / sums.dimensions, sums.entropy()
    if not math.isfinite(mse):
        raise ValueError(f"recon: the squared error of the setting {setting!r} is {mse}, takes finite values")
    psnr = math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)
    return RateDistortion(setting, sums.bits / sums.dimensions, None if entropy is None else entropy / sums.dimensions, mse, psnr)
