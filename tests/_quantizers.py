"""What the tests of quantizers share: layers, a network around one, and its training with activation checkpointing."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from fastvae.models import AE, VAE, VQVAE, VQVAE2, DenoisingAE, SparseAE
from fastvae.nn import ResidualVectorQuantizer, VectorQuantizer

DIM = 8


def batches(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def state_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def quantizer(residual=0, **options):
    options = {"decay": 0.7, **options}
    return ResidualVectorQuantizer(residual, 8, DIM, **options) if residual else VectorQuantizer(8, DIM, **options)


class Bottleneck(nn.Module):
    """A linear encoder, a quantizer, dropout and a decoder, whose gradients show what code the decoder saw."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Linear(6, DIM)
        self.quantizer = quantizer(**options)
        self.dropout = nn.Dropout(0.3)
        self.decoder = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, 6))

    def forward(self, x):
        output = self.quantizer(self.encoder(x))
        return self.decoder(self.dropout(output.quantized)), output.loss, output.perplexity.mean()


SAVED = [torch.ops.aten.addmm.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.where.self, torch.ops.fastvae.codebook_quantize.cpp]
SELECTIVE = partial(create_selective_checkpoint_contexts, SAVED)
CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": SELECTIVE},
}
LEARNING = [
    {},
    {"update": "gradient"},
    {"revive_below": 0.9},
    {"revive_below": 0.9, "update": "gradient"},
    {"kmeans_iters": 2, "update": "gradient"},
    {"kmeans_iters": 2, "revive_below": 1.0, "cosine": True},
    {"heads": 2, "revive_below": 0.5},
    {"residual": 3, "quantizer_dropout": True, "revive_below": 0.5},
    {"residual": 3, "quantizer_dropout": True, "update": "gradient"},
]


def train(model, steps, call, calls_a_step=2):
    """Gradients of every step; with several calls a step all forward passes come before the backward pass."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches(steps * calls_a_step, 40, 6)
    torch.manual_seed(1)
    gradients = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = 0.0
        for x in data[step * calls_a_step : (step + 1) * calls_a_step]:
            recon, vq_loss, _ = call(model, x.requires_grad_())
            loss = loss + recon.square().mean() + vq_loss.sum()
        loss.backward()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return gradients


BAD = [float("nan"), float("inf"), -float("inf")]


def spoil(x, rows):
    x = x.clone()
    for i, row in enumerate(rows):
        x[row, i % x.shape[1]] = BAD[i % 3]
    return x


def started_layer():
    torch.manual_seed(0)
    layer = quantizer(kmeans_iters=2)
    for x in batches(2, 30, DIM):
        layer(x + 5.0)
    return layer


class Normalised(nn.Sequential):
    """A coder whose batch norm moves and whose dropout draws in training mode."""

    def __init__(self, channels_in, channels_out):
        super().__init__(nn.Conv2d(channels_in, channels_out, 1), nn.BatchNorm2d(channels_out), nn.Dropout(0.5))


def models():
    torch.manual_seed(0)
    vq = {"num_codes": 16, "dim": DIM, "channels": 16, "hidden": 8, "decay": 0.5, "kmeans_iters": 1, "revive_below": 1.0}
    coders = lambda: (Normalised(3, 4), Normalised(4, 3))  # noqa: E731
    residual = ResidualVectorQuantizer(3, 16, 4, channels_first=True, decay=0.5, quantizer_dropout=True)
    return {
        "VQVAE": VQVAE.conv(3, **vq),
        "VQVAE of coders": VQVAE(*coders(), residual),
        "VQVAE2": VQVAE2.conv(3, **vq),
        "VAE": VAE(Normalised(3, 8), Normalised(4, 3), (4, 16, 16)),
        "AE": AE(*coders()),
        "SparseAE": SparseAE(*coders(), penalty="l1"),
        "DenoisingAE": DenoisingAE(*coders()),
    }
