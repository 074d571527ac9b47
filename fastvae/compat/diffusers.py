"""For models of diffusers, which need not be installed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import Memory
from fastvae.functional.latent import LOGVAR_CLAMP
from fastvae.nn import UpsampleConv2d
from fastvae.nn._fused_norms import is_fused
from fastvae.nn.optimize import examine, optimize


def patch_diffusers(
    vae: nn.Module,
    *,
    channels_last: bool = False,
    memory: Memory = "full",
    report: Callable[[str], None] | None = None,
    example_inputs: tuple | dict[str, Any] | None = None,
) -> nn.Module:
    """Fuses normalisation and activation, upsampling and convolution in an autoencoder of diffusers, in place, by
    :func:`fastvae.optimize`.

    The norms of the residual blocks and of the ends of encoder and decoder take over the activation behind them, and the ``upsamplers`` of
    the decoders of images compute repetition and convolution as one. Names and parameters stay, so checkpoints load as before, and what
    ``save_pretrained`` writes is what it wrote. Spatial norms and the norms of attention are left alone.

    Args:
        vae: the model; it is changed. Patching it again changes nothing.
        channels_last: also puts the weights of its convolutions into ``torch.channels_last``.
        memory: ``"lean"`` also lets the norms of the residual blocks and the convolutions behind them keep one input for the backward pass.
        report: called with one line for each norm and each upsampling; silent by default.
        example_inputs: a tuple of arguments or a dict of keyword arguments of ``vae``. What changes outputs or gradients for them by more
            than rounding is left alone.

    Returns:
        ``vae``.

    Raises:
        TypeError: where ``example_inputs`` is neither a tuple nor a dict.
        ValueError: where there is nothing to fuse, or ``vae`` gives no tensors for ``example_inputs``, or others in each call.
    """
    patched = any(is_fused(module) or isinstance(module, UpsampleConv2d) for module in vae.modules())
    findings = [] if patched else examine(vae)
    if not patched and all(finding.followed_by is None for finding in findings):
        missing = "a norm that SiLU, ReLU or GELU follows or an upsampling that a convolution follows"
        reasons = f" ({findings[0]})" if findings else ""
        raise ValueError(f"vae: got a {type(vae).__name__} without {missing}{reasons}, takes a VAE of diffusers")
    return optimize(vae, channels_last=channels_last, memory=memory, report=report, example_inputs=example_inputs)


class DiagonalGaussianDistribution:
    """The class of that name in diffusers, sampled and measured by the package's operators.

    The noise of :meth:`sample` is the package's own: reproducible from ``torch.manual_seed`` or a generator, and other than that of
    ``torch.randn``.

    Args:
        parameters: ``(batch, 2 * channels, ...)``: mean and log variance, one behind the other on dimension 1. The log variance is clamped
            to [-30, 20].
        deterministic: makes the variance 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, self._logvar = parameters.chunk(2, dim=1)

    @property
    def logvar(self) -> Tensor:
        return self._logvar.clamp(*LOGVAR_CLAMP)

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """A sample in the dtype of the parameters; differentiable.

        Args:
            generator: on the CPU or on the device of the parameters. Of a list, one for each sample of the batch, each gives its sample
                what it would give a batch of that sample alone; a list of one is that generator.

        Raises:
            ValueError: for a list of another length.
        """
        if self.deterministic:
            return self.mean
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) == 1:
            return FV.reparameterize(self.mean, self._logvar, generator=generators[0])
        if len(generators) != len(self.mean):
            raise ValueError(f"generator: got a list of {len(generators)}, takes one for each of {len(self.mean)} samples, or one alone")
        parts = zip(self.mean.split(1), self._logvar.split(1), generators, strict=True)
        return torch.cat([FV.reparameterize(mean, logvar, generator=each) for mean, logvar, each in parts])

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """The KL divergence from ``other``, by default the standard normal, in nats per sample, shape ``(batch,)``."""
        if self.deterministic:
            return torch.zeros(1)
        prior = () if other is None else (other.mean, other._logvar)
        return FV.kl_normal(self.mean, self._logvar, *prior, reduction="sample")

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """The negative log-likelihood of ``sample``, summed over ``dims``."""
        if self.deterministic:
            return torch.zeros(1)
        return FV.gaussian_nll(self.mean, sample, self.logvar, reduction="none").sum(tuple(dims))

    def mode(self) -> Tensor:
        return self.mean
