"""Reparameterized sampling with the analytic KL divergence."""

import torch

from benchmarks.registry import Case, Inputs, Results, WrongResult, compiled, forced, forward_backward
from fastvae import functional as FV


def eager(mu, logvar):
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return z, kl


def fused(mu, logvar):
    return FV.reparameterize_kl(mu, logvar, reduction="sum")


def make_inputs(size, dtype, device) -> Inputs:
    mu, logvar = (torch.randn(size, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    return Inputs({"mu": mu, "logvar": logvar}, incoming=(torch.randn(size, dtype=dtype, device=device), None))


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads mu and logvar and writes z; backward reads them and z's gradient and writes two gradients."""
    return 8 * inputs.leaves["mu"].nbytes


def without_noise(results: Results, inputs: Inputs) -> Results:
    """The results that do not depend on the noise, which every provider draws for itself and which is judged by its moments.

    Its share of the gradient of logvar is grad_z (z - mu) / 2.
    """
    mu, logvar = (leaf.detach().double() for leaf in inputs.leaves.values())
    scaled_noise = results["z"].double() - mu
    _check_moments(scaled_noise * torch.exp(-0.5 * logvar))
    share = 0.5 * inputs.incoming[0].double() * scaled_noise
    return {"kl": results["kl"], "grad mu": results["grad mu"], "grad logvar": results["grad logvar"].double() - share}


def _check_moments(noise) -> None:
    """Mean and variance within 7 of their standard errors."""
    mean, variance, count = noise.mean().item(), noise.var().item(), noise.numel()
    if not (abs(mean) < 7 * count**-0.5 and abs(variance - 1) < 7 * (2 / count) ** 0.5):
        raise WrongResult(f"the noise has the mean {mean:.4g} and the variance {variance:.4g} over {count} elements")


def _case(size, dtype=torch.float32, quick=False) -> Case:
    return Case(
        family="latent",
        name="reparameterize_kl",
        size=size,
        tiny=(7, 5),
        dtype=dtype,
        setup=make_inputs,
        providers={
            "eager": forward_backward(eager),
            "compile": compiled(eager),
            "fastvae": forward_backward(fused),
            "fastvae-fallback": forced(forward_backward(fused), "fallback"),
        },
        outputs=("z", "kl"),
        work=bytes_moved,
        compare=without_noise,
        quick=quick,
    )


CASES = (
    _case((8192, 128), quick=True),
    _case((128, 20), quick=True),
    _case((8192, 128), torch.bfloat16),
)
