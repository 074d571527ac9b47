"""Training steps (forward, backward, optimizer) of large convolutional VAEs: the residual VAE of the package and diffusers' AutoencoderKL.

The baselines are the same networks of plain PyTorch modules with plain PyTorch losses. ``channels-last`` has weights and images in that
layout, the others are contiguous; the package's have the channels last, but for ``-nchw``. ``-lean`` keeps of a normalisation and the
convolution behind it one input for the backward pass.
"""

import dataclasses
import functools
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.registry import Case, Inputs, Provider, Results, Unavailable
from fastvae import functional as FV
from fastvae._types import Memory
from fastvae.compat import patch_diffusers
from fastvae.models import ImageVAE
from fastvae.training.plain_torch import with_plain_layers

CHANNELS, LATENT_CHANNELS = (32, 64, 128), 4


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

    def __init__(self, size, device, fused: bool, memory: Memory = "full"):
        model = self.plain_model(size[1])
        self.model = (patch_diffusers(model, memory=memory) if fused else model).to(device)

    def plain_model(self, channels: int):
        from diffusers import AutoencoderKL

        levels = len(CHANNELS)
        return AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
        )

    def encode(self, x):
        return self.model.encode(x).latent_dist.parameters

    def decode(self, z):
        return self.model.decode(z).sample


class Wan(Diffusers):
    """The video autoencoder of Wan 2.1 with a third of its channels and one level less."""

    def plain_model(self, channels: int):
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan(base_dim=32, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4], num_res_blocks=2, temperal_downsample=[False, True])


class Mochi(Diffusers):
    """The video autoencoder of Mochi with a quarter of its channels and a block where it has several."""

    def plain_model(self, channels: int):
        from diffusers import AutoencoderKLMochi

        widths = (32, 64, 64, 96)
        return AutoencoderKLMochi(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            latent_channels=LATENT_CHANNELS,
            layers_per_block=(1,) * 5,
        )


def make_inputs(size, dtype, device) -> Inputs:
    return Inputs({}, {"x": torch.rand(size, device=device), "size": size})


def training_step(
    network, *, fused: bool = False, channels_last: bool = False, compile: bool = False, autocast: torch.dtype | None = None
) -> Provider:
    """A step of Adam on ``network(size, device, fused)``; the sum of its gradients' squares stands for them in the comparison."""
    loss_function = fused_loss if fused else plain_loss

    def provide(inputs: Inputs):
        x = inputs.others["x"]
        torch.manual_seed(0)
        net = network(inputs.others["size"], x.device, fused)
        with torch.no_grad():
            shape = net.encode(x).chunk(2, dim=1)[0].shape
        # The noise is the same in every memory layout.
        eps = torch.randn(shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
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


def counted_flops(network, inputs: Inputs) -> float:
    """Of a network's convolutions and products, forward and backward, as torch counts those of its forward pass."""
    x = inputs.others["x"]
    net = network(inputs.others["size"], x.device, False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.decode(net.encode(x).chunk(2, dim=1)[0])
    return 3.0 * counter.get_total_flops()


def _case(name, network, size, dtype, tiny=(1, 3, 16, 16)) -> Case:
    autocast = None if dtype == torch.float32 else dtype

    def step(network=network, **options):
        return training_step(network, **{"autocast": autocast, **options})

    return Case(
        family="conv_vae",
        name=name,
        size=size,
        tiny=tiny,
        dtype=dtype,
        setup=make_inputs,
        providers={
            "eager-fp32": step(autocast=None),
            "eager": step(),
            "eager-channels-last": step(channels_last=True),
            "compile": step(compile=True),
            "compile-channels-last": step(compile=True, channels_last=True),
            "fastvae": step(fused=True, channels_last=True),
            "fastvae-lean": step(functools.partial(network, memory="lean"), fused=True, channels_last=True),
            "fastvae-nchw": step(fused=True),
            "fastvae-compile": step(fused=True, channels_last=True, compile=True),
        },
        outputs=("loss", "gradient norm"),
        work=flops,
        unit="FLOP",
        compare=rounded,
    )


def _video_case(name, network, size, dtype, tiny) -> Case:
    """Videos stay contiguous: their modules cut and join frames."""
    case = _case(name, network, size, dtype, tiny)
    step = functools.partial(training_step, fused=True, autocast=None if dtype == torch.float32 else dtype)
    ours = {"fastvae": step(network), "fastvae-lean": step(functools.partial(network, memory="lean"))}
    plain = {name: provider for name, provider in case.providers.items() if name in ("eager-fp32", "eager", "compile")}
    return dataclasses.replace(case, providers=plain | ours, work=functools.partial(counted_flops, network))


CASES = (
    _case("residual_vae_step", Residual, (4, 3, 128, 128), torch.float32),
    _case("residual_vae_step", Residual, (4, 3, 128, 128), torch.bfloat16),
)
if importlib.util.find_spec("diffusers"):
    CASES += (
        _case("autoencoder_kl_step", Diffusers, (2, 3, 128, 128), torch.float32),
        _case("autoencoder_kl_step", Diffusers, (2, 3, 128, 128), torch.bfloat16),
        _video_case("wan_step", Wan, (1, 3, 5, 64, 64), torch.bfloat16, (1, 3, 5, 8, 8)),
        _video_case("mochi_step", Mochi, (1, 3, 7, 64, 64), torch.bfloat16, (1, 3, 7, 16, 16)),
    )
