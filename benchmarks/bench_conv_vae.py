"""Training steps (forward, backward, optimizer) of large convolutional VAEs: the residual VAE of the package and diffusers' AutoencoderKL.

The baselines are the same networks of plain PyTorch modules with plain PyTorch losses. ``channels-last`` has weights and images in that
layout, the others are contiguous; the package's have the channels last, but for ``-nchw``. ``-lean`` keeps of a normalisation and the
convolution behind it one input for the backward pass.
"""

import functools
import importlib.util
import math

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Inputs, Provider, Results, Unavailable
from fastvae import functional as FV
from fastvae._types import Memory
from fastvae.compat import patch_diffusers
from fastvae.models import ImageVAE
from fastvae.training.plain_torch import with_plain_layers

CHANNELS = (32, 64, 128)


def plain_loss(encode, decode, x, eps):
    """The negative evidence lower bound as a tutorial writes it."""
    mu, logvar = (t.float() for t in encode(x).chunk(2, dim=1))
    recon = decode(mu + torch.exp(0.5 * logvar) * eps)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return F.binary_cross_entropy_with_logits(recon.float(), x, reduction="sum") + kl


def fused_loss(encode, decode, x, eps):
    mu, logvar = (t.float() for t in encode(x).chunk(2, dim=1))
    z, kl = FV.reparameterize_kl(mu, logvar, eps=eps, reduction="sum")
    return FV.binary_cross_entropy_with_logits(decode(z), x, reduction="sum") + kl


class Residual:
    """The residual VAE."""

    def __init__(self, size, device, fused: bool, memory: Memory = "full"):
        model = ImageVAE.residual(size[1], CHANNELS, precision="float32", memory=memory).to(device)
        self.model = model if fused else with_plain_layers(model)

    def encode(self, x):
        return self.model.encoder(x)

    def decode(self, z):
        return self.model.decoder(z)


class Diffusers:
    """AutoencoderKL with the channels of the residual VAE: a quarter of Stable Diffusion's."""

    def __init__(self, size, device, fused: bool):
        from diffusers import AutoencoderKL

        levels = len(CHANNELS)
        model = AutoencoderKL(
            in_channels=size[1],
            out_channels=size[1],
            block_out_channels=CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
        )
        self.model = (patch_diffusers(model) if fused else model).to(device)

    def encode(self, x):
        return self.model.quant_conv(self.model.encoder(x))

    def decode(self, z):
        return self.model.decoder(self.model.post_quant_conv(z))


def make_inputs(size, dtype, device) -> Inputs:
    latent = (size[0], 4, *(length // 2 ** (len(CHANNELS) - 1) for length in size[2:]))
    others = {"x": torch.rand(size, device=device), "eps": torch.randn(latent, device=device), "size": size}
    return Inputs({}, others)


def training_step(
    network, *, fused: bool = False, channels_last: bool = False, compile: bool = False, autocast: torch.dtype | None = None
) -> Provider:
    """A step of Adam on ``network(size, device, fused)``; the sum of its gradients' squares stands for them in the comparison."""
    loss_function = fused_loss if fused else plain_loss

    def provide(inputs: Inputs):
        x, eps = inputs.others["x"], inputs.others["eps"]
        torch.manual_seed(0)
        net = network(inputs.others["size"], x.device, fused)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        net.model.to(memory_format=layout)
        x = x.contiguous(memory_format=layout)
        optimizer = torch.optim.Adam(net.model.parameters(), 1e-4)

        def forward(x, eps):
            with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
                return loss_function(net.encode, net.decode, x, eps)

        run = _compile(forward) if compile else forward

        def operation():
            optimizer.zero_grad()
            loss = run(x, eps)
            loss.backward()
            optimizer.step()
            squares = torch.stack(torch._foreach_norm([p.grad for p in net.model.parameters()])).square().sum()
            return loss, squares.sqrt()

        return operation

    return provide


def _compile(function):
    try:
        return torch.compile(function)
    except RuntimeError as error:
        raise Unavailable(f"torch.compile does not work here: {error}") from error


def rounded(results: Results, inputs: Inputs) -> Results:
    """Loss and gradient norm: figures of a deep network, to what 16 bits leave of them."""
    return {name: value.detach().to(torch.bfloat16) for name, value in results.items()}


def flops(inputs: Inputs) -> float:
    """Of the convolutions of the residual VAE, forward and backward."""
    batch, _, height, width = inputs.others["size"]
    total, previous = 0.0, CHANNELS[0]
    for level, channels in enumerate(CHANNELS):
        positions = batch * math.prod((height, width)) / 4**level
        first = previous * channels * 9 + channels * channels * 9
        total += 2 * 2 * positions * (first + 2 * channels * channels * 9)
        previous = channels
    return 3 * total


def _case(name, network, size, dtype, **variants) -> Case:
    """``variants`` are further networks, by the name of the provider."""
    autocast = None if dtype == torch.float32 else dtype

    def step(**options):
        return training_step(network, **{"autocast": autocast, **options})

    return Case(
        family="conv_vae",
        name=name,
        size=size,
        tiny=(1, 3, 16, 16),
        dtype=dtype,
        setup=make_inputs,
        providers={
            "eager-fp32": step(autocast=None),
            "eager": step(),
            "eager-channels-last": step(channels_last=True),
            "compile": step(compile=True),
            "compile-channels-last": step(compile=True, channels_last=True),
            "fastvae": step(fused=True, channels_last=True),
            **{variant: training_step(other, fused=True, channels_last=True, autocast=autocast) for variant, other in variants.items()},
            "fastvae-nchw": step(fused=True),
            "fastvae-compile": step(fused=True, channels_last=True, compile=True),
        },
        outputs=("loss", "gradient norm"),
        work=flops,
        unit="FLOP",
        compare=rounded,
    )


LEAN = {"fastvae-lean": functools.partial(Residual, memory="lean")}
CASES = (
    _case("residual_vae_step", Residual, (4, 3, 128, 128), torch.float32, **LEAN),
    _case("residual_vae_step", Residual, (4, 3, 128, 128), torch.bfloat16, **LEAN),
)
if importlib.util.find_spec("diffusers"):
    CASES += (
        _case("autoencoder_kl_step", Diffusers, (2, 3, 128, 128), torch.float32),
        _case("autoencoder_kl_step", Diffusers, (2, 3, 128, 128), torch.bfloat16),
    )
