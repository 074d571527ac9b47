"""The demonstration's headline: time and peak memory of training steps, and of the loss lines alone, in plain torch and with fastvae."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.models import VAE, VQVAE, ImageVAE
from fastvae.models.image_vae import bfloat16_pays
from fastvae.models.networks import ResidualDecoder, ResidualEncoder
from fastvae.training._measure import interleaved_medians, peak_memory
from fastvae.training.comparison import FUSED, PLAIN, LossLines, negative_elbo
from fastvae.training.plain_torch import PlainVectorQuantizer, with_plain_layers

# Height and width of the images of the two large networks.
IMAGE_SIZE = 128
LATENT_CHANNELS = 4
NUM_CODES, CODE_DIM = 1024, 64
# Steps of a large network that are timed, and of what takes milliseconds.
FEW_STEPS, MANY_STEPS = 5, 30

# A ratio below this does not pay: medians of a few steps differ by some percent from run to run.
PAYS = 1.1

Call = Callable[[], None]


@dataclass(frozen=True)
class Pair:
    """One piece of work in plain torch and with fastvae.

    Args:
        title, conditions: what is done, and on what.
        plain_label: what stands for plain torch.
        plain, fastvae: the work, done once a call.
        rounds: calls of each that are timed.
    """

    title: str
    conditions: str
    plain_label: str
    plain: Call
    fastvae: Call
    rounds: int


def measure_all() -> dict[str, dict[str, Any]]:
    """The figures of every pair by its title. The networks of one are freed before those of the next are made."""
    figures = {}
    for make in (residual_vae, vq_vae, loss_lines, small_vae):
        pair = make()
        figures[pair.title] = measure(pair)
    return figures


def measure(pair: Pair) -> dict[str, Any]:
    """Median time in ms and peak memory in MiB of ``"plain"`` and ``"fastvae"``, after a call that allocates what stays."""
    calls = {"plain": pair.plain, "fastvae": pair.fastvae}
    for call in calls.values():
        call()
    peaks = {name: peak_memory(call) / 2**20 for name, call in calls.items()}
    medians = interleaved_medians(calls, pair.rounds)
    return {
        "conditions": pair.conditions,
        "plain": pair.plain_label,
        "median_ms": {name: 1e3 * seconds for name, seconds in medians.items()},
        "peak_memory_mib": peaks,
    }


def verdict(values: dict[str, float], gain: str) -> str:
    """The factor by which fastvae takes less, ``"1.6x faster"`` for the gain ``"faster"``, or the statement that it does not pay."""
    ratio = values["plain"] / values["fastvae"]
    return f"{ratio:.1f}x {gain}" if ratio >= PAYS else f"does not pay ({ratio:.2f}x)"


def training_step(modules: Iterable[nn.Module], loss: Callable[[], Tensor]) -> Call:
    """A step of Adam on the parameters of ``modules``. It leaves no gradients, so that its peak memory counts them."""
    optimizer = torch.optim.Adam([p for module in modules for p in module.parameters()], lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def residual_vae() -> Pair:
    """The residual VAE in the precision that it takes by itself; in plain torch the same network, contiguous, where that is faster."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    ours = ImageVAE.residual()
    plain = VAE(with_plain_layers(ResidualEncoder()), with_plain_layers(ResidualDecoder()))
    bfloat16 = bfloat16_pays(x.device)

    def plain_loss() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            return negative_elbo(plain, PLAIN, x)

    return Pair(
        "step of a residual conv VAE",
        f"{describe(x)}, {'bfloat16' if bfloat16 else 'float32'}",
        "plain torch",
        training_step([plain], plain_loss),
        training_step([ours], lambda: ours(x).loss),
        FEW_STEPS,
    )


def vq_vae() -> Pair:
    """The network of the VQ-VAE paper, with our quantizer and with another one."""
    torch.manual_seed(0)
    x = torch.rand(8, 3, IMAGE_SIZE, IMAGE_SIZE)
    ours, other = (VQVAE.conv(num_codes=NUM_CODES, dim=CODE_DIM) for _ in range(2))
    label, quantizer = other_quantizer(NUM_CODES, CODE_DIM)

    def other_loss() -> Tensor:
        quantized, vq_loss = quantizer(other.encoder(x))
        return F.mse_loss(other.decoder(quantized), x) + vq_loss

    return Pair(
        "step of a VQ-VAE",
        f"{describe(x)}, {NUM_CODES} codes",
        label,
        training_step([other.encoder, other.decoder], other_loss),
        training_step([ours], lambda: ours(x).loss),
        FEW_STEPS,
    )


def other_quantizer(num_codes: int, dim: int) -> tuple[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The quantizer of vector-quantize-pytorch, or one of plain torch where that is not installed: its name, and the layer's function."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ModuleNotFoundError:
        return "plain torch", PlainVectorQuantizer(num_codes, dim)
    layer = VectorQuantize(dim, num_codes, decay=0.99, commitment_weight=0.25, rotation_trick=False, accept_image_fmap=True)

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = layer(x)
        return quantized, loss.sum()

    return "vector-quantize-pytorch", quantize


def loss_lines() -> Pair:
    """Sampling, KL and cross-entropy of a batch of images, forward and backward."""
    torch.manual_seed(0)
    x = torch.rand(32, 3, IMAGE_SIZE, IMAGE_SIZE)
    latent = (len(x), LATENT_CHANNELS, IMAGE_SIZE // 4, IMAGE_SIZE // 4)
    mu, logvar, grad_z = (torch.randn(latent) for _ in range(3))
    leaves = [t.requires_grad_() for t in (mu, 0.1 * logvar, torch.randn_like(x))]

    def run(lines: LossLines) -> None:
        z, kl = lines.latent(leaves[0], leaves[1], None)
        loss = lines.recon_loss(leaves[2], x) + kl
        torch.autograd.backward((loss, z), (None, grad_z))
        for leaf in leaves:
            leaf.grad = None

    return Pair(
        "loss lines alone",
        f"{describe(x)}, float32",
        "plain torch",
        lambda: run(PLAIN),
        lambda: run(FUSED),
        MANY_STEPS,
    )


def small_vae() -> Pair:
    """The convolutional VAE of the tutorials, of whose step the losses are a small part."""
    torch.manual_seed(0)
    x = torch.rand(128, 1, 28, 28)
    ours, plain = VAE.conv(), VAE.conv()
    return Pair(
        "step of a small conv VAE",
        f"{describe(x)}, float32",
        "plain torch",
        training_step([plain], lambda: negative_elbo(plain, PLAIN, x)),
        training_step([ours], lambda: ours(x).loss),
        MANY_STEPS,
    )


def describe(x: Tensor) -> str:
    count, *sizes = x.shape
    return f"{count} images of {' x '.join(map(str, sizes))}"
