"""Training steps of diffusers' AutoencoderKL before and after ``patch_diffusers``: same losses, other time.

    python examples/patch_autoencoder_kl.py

Needs ``pip install diffusers``. The model is randomly initialised and smaller than Stable Diffusion's; a checkpoint loads before or after
the patch alike.
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import trange

from fastvae.compat import patch_diffusers


def make_model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
    )


def train(model: AutoencoderKL, x: torch.Tensor, steps: int, autocast: bool) -> tuple[list[float], float]:
    """The losses and the shortest step in seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, shortest = [], float("inf")
    torch.manual_seed(1)
    for _ in trange(steps, desc="training"):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            posterior = model.encode(x).latent_dist
            recon = model.decode(posterior.sample()).sample
        loss = F.mse_loss(recon.float(), x) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        shortest = min(shortest, time.perf_counter() - start)
    return losses, shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast, for processors that multiply it in hardware")
    arguments = parser.parse_args()
    x = torch.rand(2, 3, arguments.size, arguments.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = make_model()
    patched = patch_diffusers(copy.deepcopy(model), channels_last=True, report=print)
    for name, network in (("as it is", model), ("patched", patched)):
        losses, seconds = train(network, x, arguments.steps, arguments.bf16)
        print(f"{name:>8}: {1e3 * seconds:.0f} ms a step, losses {', '.join(f'{loss:.5f}' for loss in losses)}")


if __name__ == "__main__":
    main()
