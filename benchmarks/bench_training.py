"""What Lightning's loop costs: a training by `Trainer.fit` with `LitAutoencoder` and a data module, beside a bare loop of torch.

Both train the same model with the same batches, noise and fused Adam. A call is a whole training of the steps in brackets, with the set-up
of the loop and of the optimizer. The trainer has neither a logger nor a progress bar.
"""

import logging
from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.registry import Case, Inputs, Operation
from fastvae.models import VAE, ImageVAE
from fastvae.training._warnings import ignore_warnings_of_lightning
from fastvae.training.data_module import AutoencoderData
from fastvae.training.module import LitAutoencoder
from fastvae.training.sources import InMemory, Source

LEARNING_RATE = 1e-3


class Images(AutoencoderData):
    """8-bit images in memory, all of them for training."""

    def __init__(self, x: Tensor, batch_size: int):
        super().__init__(batch_size=batch_size, val=0.0, test=0.0)
        self.x = x

    def load(self) -> tuple[Source, None]:
        return InMemory(self.x), None


class WithNoise(nn.Module):
    """A VAE with the same noise in each step, so that two trainings have the same losses, of which it keeps the last one."""

    def __init__(self, model: VAE, eps: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("eps", eps)
        self.last_loss = torch.empty(())

    def forward(self, x: Tensor):
        output = self.model(x, eps=self.eps)
        self.last_loss = output.loss.detach()
        return output


def make_network(inputs: Inputs) -> WithNoise:
    torch.manual_seed(0)
    model = inputs.others["make"](inputs.others["size"])
    eps = torch.randn(inputs.others["size"][1], *model.latent_shape)
    return WithNoise(model, eps).to(inputs.others["device"])


def bare_loop(inputs: Inputs) -> Operation:
    """The loop that a user writes."""
    network, data, device = make_network(inputs), inputs.others["data"], inputs.others["device"]
    data.setup()

    def train():
        optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
        # The order in which the data module's sampler shuffles its first epoch.
        order = data.indices.train[torch.randperm(len(data.x), generator=torch.Generator().manual_seed(data.seed))]
        for index in order.split(data.batch_size):
            loss = network(data.x[index].to(device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network.last_loss

    return train


def lightning_loop(inputs: Inputs) -> Operation:
    # Lightning reports the devices and the end of each training.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_warnings_of_lightning()
    network, data = make_network(inputs), inputs.others["data"]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def train():
        trainer = Trainer(accelerator=inputs.others["device"].type, devices=1, max_epochs=1, limit_val_batches=0, **quiet)
        trainer.fit(LitAutoencoder(network, learning_rate=LEARNING_RATE), datamodule=data)
        return network.last_loss

    return train


def flops(inputs: Inputs) -> float:
    """The operations of the convolutions and matrix products of all steps, forward and backward."""
    steps, batch, *_ = inputs.others["size"]
    network = make_network(inputs)
    with FlopCounterMode(display=False) as counter:
        network(inputs.others["data"].x[:batch].to(inputs.others["device"])).loss.backward()
    return float(steps * counter.get_total_flops())


def _case(name: str, make: Callable[[tuple[int, ...]], VAE], size: tuple[int, ...], tiny: tuple[int, ...]) -> Case:
    """``size`` is the number of steps and the size of a batch."""

    def make_inputs(size, dtype, device) -> Inputs:
        steps, batch, *shape = size
        x = torch.randint(256, (steps * batch, *shape), dtype=torch.uint8)
        return Inputs({}, {"make": make, "size": size, "data": Images(x, batch), "device": device})

    return Case(
        family="training",
        name=name,
        size=size,
        tiny=tiny,
        setup=make_inputs,
        providers={"bare-loop": bare_loop, "fastvae": lightning_loop},
        outputs=("last loss",),
        work=flops,
        unit="FLOP",
    )


def _small(size: tuple[int, ...]) -> VAE:
    return VAE.conv()


def _residual(size: tuple[int, ...]) -> VAE:
    return ImageVAE.residual(channels=(32, 64), image_size=size[-1], precision="float32")


CASES = (
    _case("conv_vae_training", _small, (100, 128, 1, 28, 28), (3, 4, 1, 28, 28)),
    _case("residual_vae_training", _residual, (10, 8, 3, 64, 64), (3, 2, 3, 8, 8)),
)
