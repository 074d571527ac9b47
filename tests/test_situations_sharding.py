"""Models whose parameters are sharded over two processes by FSDP train as whole ones do."""

import copy

import torch
from _helpers import Source
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import fastvae
from fastvae.models import VAE, VQVAE, ContractiveAE, ImageVAE
from fastvae.models.networks import ResidualBlock
from fastvae.nn import LinearSchedule


def residual(**options):
    sizes = {"channels": (8, 16), "blocks": 1, "groups": 4, "latent_channels": 2, "image_size": 8}
    return ImageVAE.residual(**sizes, precision="float32", beta=LinearSchedule(2, 0.5), **options)


def images(rank: int):
    source = Source("cpu", seed=rank)
    return source.uniform(2, 3, 8, 8), source.normal(2, 2, 4, 4)


MODELS = {
    "residual": (residual, images),
    "residual-optimized": (lambda: fastvae.optimize(residual(), report=None), images),
    "mlp": (lambda: VAE.mlp(16, (8,), 3), lambda rank: (Source("cpu", seed=rank).uniform(4, 16), Source("cpu", seed=rank).normal(4, 3))),
    "contractive": (lambda: ContractiveAE.mlp(16, (8,), 4), lambda rank: (Source("cpu", seed=rank).uniform(4, 16),)),
    "vq": (
        lambda: VQVAE.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1, update="gradient"),
        lambda rank: (Source("cpu", seed=rank).uniform(2, 1, 8, 8),),
    ),
}


CASES = [("residual", False), ("residual", True), ("residual-optimized", False), ("mlp", False), ("contractive", False), ("vq", False)]


def _compare_all(rank):
    for name, blocks in CASES:
        _compare(rank, name, blocks)


def _compare(rank, name, blocks):
    make, arguments = MODELS[name]
    torch.manual_seed(0)
    whole = make()
    model = copy.deepcopy(whole)
    for module in model.modules():
        if blocks and isinstance(module, ResidualBlock):
            fully_shard(module)
    fully_shard(model)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (whole, model)]
    for _ in range(3):
        losses = torch.stack([whole(*arguments(r)).loss for r in range(2)])
        loss = model(*arguments(rank)).loss
        torch.testing.assert_close(loss, losses[rank], rtol=1e-4, atol=1e-4)
        losses.mean().backward()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), expected, rtol=1e-4, atol=1e-4)
    if name == "residual":
        _sample_and_optimize(model)


def _sample_and_optimize(model):
    """Sharded convolutions keep their layout, and the model goes on."""
    fastvae.optimize(model, channels_last=True, report=None)
    register_fsdp_forward_method(model, "sample")
    assert model.sample(3).numpy().shape == (3, 3, 8, 8)


def test_sharded_models_train_as_whole_ones(ranks):
    """Each rank compares its own; an assertion that fails in one is the test's error."""
    assert ranks.run(_compare_all) == [None, None]


def test_parameters_are_contiguous():
    """FSDP refuses others."""
    for make, _ in MODELS.values():
        assert all(parameter.is_contiguous() for parameter in make().parameters())
